"""Finding the best schedule under a bound, on the device it runs on (`reroute tune`).

| module | what it does |
|---|---|
| space | which schedules are looked at: specs enumerated, resolved, merged |
| bounds | latency and memory limits, and by how much a candidate misses them |
| trace | what is known of a candidate, and what became of it |
| budgets | which questions to search with, how many in each round, and which to keep back |
| screening | latency of all candidates beside the dense engine; the clearly too slow leave early |
| halving | successive halving on the questions |
| search | all of it in order, against a `Device` |
| workshop | the real device: exports, builds, measures, asks |
| document | tune.json and routing.toml |
| report | Markdown |
| command | the command |
"""
