"""Reroute: recoverable visual-token routing inside deployed vision-language engines (arXiv 2606.12412).

The stages, each of which reads only what the one before it wrote to disk:

* `reroute.export`: a Hugging Face checkpoint becomes ONNX graphs, a manifest and a recorded torch reference.
* `reroute.engines`: the graphs become an engine bundle for one backend, checked against the reference.
* `reroute.runtime`: the bundle answers questions about images; it needs neither torch nor onnx.

What they share lives here and depends on nothing: `routing`, `cost`, `manifest`, `errors`.
"""

__version__ = "0.1.0"
