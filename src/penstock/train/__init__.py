"""Training of the small model that ships in the package: tokenizer, data, model, loop, score.

Commands: ``python -m penstock.train prepare | chat | run | export | score`` (see recipes/tiny).
"""
