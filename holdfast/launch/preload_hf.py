"""Imported by the fork server of a run whose model is of transformers: seconds, once for all workers."""

from holdfast.trainer import hf

_ = hf.library().AutoModelForCausalLM
