"""Continual adapters on a frozen model: one bank of low-rank tensors that grows by a part with each task. Need torch
and nothing else, and take any ``nn.Module``::

    from holdfast import adapters

    adapters.inject(model, adapters.create_method("mora", {"rank": 8}), ["wq", "wk", "wv", "wo"])
    plan = adapters.TaskPlan(steps=500, optimizer=partial(torch.optim.AdamW, lr=5e-4))
    for task in tasks:
        adapters.start_task(model, task.name)
        adapters.train_task(model, task.batches, loss, plan)
        # or in a loop of your own: a new optimizer over trainable_parameters(model), and loss + penalty(model)
        adapters.finish_task(model)
    adapters.save_adapters(model, directory)

A base in four bits, before it gets adapters::

    adapters.quantise_base(model, ["wq", "wk", "wv", "wo"])

LoRA folders of Hugging Face PEFT are read and written without PEFT::

    adapters.load_peft(model, directory)
    adapters.save_peft(model, directory)
"""

from holdfast.adapters.accounting import BaseFootprint, Footprint, base_footprint, footprint
from holdfast.adapters.adapted import Adapters, adapters_of, trainable_parameters
from holdfast.adapters.fingerprint import base_fingerprint
from holdfast.adapters.forgetting import LossMatrix, bits_per_byte, mean_loss
from holdfast.adapters.inject import eject, inject, merge
from holdfast.adapters.inputs import collect_inputs
from holdfast.adapters.layer import AdaptedLinear
from holdfast.adapters.method import Method, Site
from holdfast.adapters.metrics import RoutingStats, boundary_jump, measure_routing
from holdfast.adapters.nf4 import NF4Linear
from holdfast.adapters.peft import load_peft, save_peft
from holdfast.adapters.quantise import dequantise_base, quantise_base
from holdfast.adapters.registry import create_method, method_names, register
from holdfast.adapters.store import Sidecar, append_adapters, load_adapters, read_sidecar, save_adapters
from holdfast.adapters.tasks import abandon_task, finish_task, penalty, start_task, use_tasks, using_tasks
from holdfast.adapters.training import TaskPlan, Trained, train_task

__all__ = [
    "AdaptedLinear",
    "Adapters",
    "BaseFootprint",
    "Footprint",
    "LossMatrix",
    "Method",
    "NF4Linear",
    "RoutingStats",
    "Sidecar",
    "Site",
    "TaskPlan",
    "Trained",
    "abandon_task",
    "adapters_of",
    "append_adapters",
    "base_fingerprint",
    "base_footprint",
    "bits_per_byte",
    "boundary_jump",
    "collect_inputs",
    "create_method",
    "dequantise_base",
    "eject",
    "finish_task",
    "footprint",
    "inject",
    "load_adapters",
    "load_peft",
    "mean_loss",
    "measure_routing",
    "merge",
    "method_names",
    "penalty",
    "quantise_base",
    "read_sidecar",
    "register",
    "save_adapters",
    "save_peft",
    "start_task",
    "train_task",
    "trainable_parameters",
    "use_tasks",
    "using_tasks",
]
