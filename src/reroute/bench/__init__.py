"""Measuring bundles (`reroute bench`), and the regression gate on top of it (`reroute compare`).

| module | what it does |
|---|---|
| workload | one repetition of one bundle at one text length: what is timed and what is not |
| measure | many repetitions of many candidates, interleaved |
| memory | peak memory of a session, in a process of its own |
| machine | facts of the machine, and the fingerprint that tells devices apart |
| statistics | medians, spread, and intervals of ratios |
| document | bench.json: written by bench, read by compare |
| report | Markdown and CSV |
| compare | what counts as a regression |
| bench_command, compare_command | the two commands |
"""
