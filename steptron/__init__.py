"""Steptron: pretraining of sparse mixture-of-experts language models of the Step 3.5 Flash kind."""

__version__ = "0.1.0"
