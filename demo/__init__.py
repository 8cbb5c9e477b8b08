"""Demo model: a small LLaVA trained from scratch on generated scenes of coloured shapes.

Modules: ``scenes`` (what is drawn and asked), ``tokenizer``, ``model`` (configuration and files), ``data``
(training batches), ``packed`` (training forward), ``train`` and ``evaluate`` (commands).
"""
