"""Steptron: pretraining of sparse mixture-of-experts language models like Step 3.5 Flash."""

__version__ = "0.1.0"
