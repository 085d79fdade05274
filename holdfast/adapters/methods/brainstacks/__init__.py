"""Brainstacks: frozen stacks of LoRA experts, a stack for each round of each domain, and a router found by outcome.

The method itself is one more of ``holdfast.adapters``. What is here besides is how its stacks are trained, chosen,
kept::

    from holdfast.adapters.methods import brainstacks

    adapters.inject(model, brainstacks.Brainstacks(rank=16))
    progress = brainstacks.Curriculum(library=directory).learn(model, domains)
    with adapters.using_tasks(model, weights=brainstacks.prefix(progress.stacks, "code")):
        ...  # bit by bit what was validated when code was frozen
    with brainstacks.page_stacks(other, directory, budget_bytes=2**30):
        ...  # the same stacks, read when they act

A ``Domain`` whose ``tune`` calls ``brainstacks.tune_preferences`` has its stacks learn preferences, too, before they
are frozen.

Source: arXiv 2604.01152.
"""

from holdfast.adapters.methods.brainstacks.boosting import BoostPlan, Domain, boost, validate
from holdfast.adapters.methods.brainstacks.curriculum import Curriculum, Progress
from holdfast.adapters.methods.brainstacks.library import Manifest, Record, add_stack, read_manifest, remove_stack
from holdfast.adapters.methods.brainstacks.method import Brainstacks
from holdfast.adapters.methods.brainstacks.pager import Pager, PagerStats, page_stacks
from holdfast.adapters.methods.brainstacks.preference import (
    Pairs,
    PreferencePlan,
    Preferences,
    Tuned,
    preference_loss,
    tune_preferences,
)
from holdfast.adapters.methods.brainstacks.projection import protect, protected_directions, top_directions
from holdfast.adapters.methods.brainstacks.router import (
    Examples,
    MetaRouter,
    RouterPlan,
    base_features,
    choose,
    router_loss,
    train_router,
)
from holdfast.adapters.methods.brainstacks.search import (
    Found,
    exhaustive,
    greedy,
    oracle,
    outcome_loss,
    regret,
    targets,
)
from holdfast.adapters.methods.brainstacks.stacks import (
    Stack,
    check_frozen,
    own_only,
    prefix,
    replay,
    routed,
    stack_digest,
    ungated,
)

__all__ = [
    "BoostPlan",
    "Brainstacks",
    "Curriculum",
    "Domain",
    "Examples",
    "Found",
    "Manifest",
    "MetaRouter",
    "Pager",
    "PagerStats",
    "Pairs",
    "PreferencePlan",
    "Preferences",
    "Progress",
    "Record",
    "RouterPlan",
    "Stack",
    "Tuned",
    "add_stack",
    "base_features",
    "boost",
    "check_frozen",
    "choose",
    "exhaustive",
    "greedy",
    "oracle",
    "outcome_loss",
    "own_only",
    "page_stacks",
    "preference_loss",
    "prefix",
    "protect",
    "protected_directions",
    "read_manifest",
    "regret",
    "remove_stack",
    "replay",
    "routed",
    "router_loss",
    "stack_digest",
    "targets",
    "top_directions",
    "train_router",
    "tune_preferences",
    "ungated",
    "validate",
]
