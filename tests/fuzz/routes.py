"""Routing and advantages, by the library and by the oracle."""

from __future__ import annotations

import torch

import reference
import srpo_kernels as sk
from tests.comparison import Results
from tests.fuzz.case import Case
from tests.fuzz.models import Inputs


def library_routing(case: Case, inputs: Inputs) -> Results:
    rewards, groups = inputs["rewards"], inputs["group_ids"]
    routing = sk.route_samples(rewards, groups, case.options["success_threshold"], inputs["feedback_available"])
    candidates = _oracle_routes(case, inputs).candidates
    chosen = candidates.gather(1, routing.teacher_index.clamp(min=0)[:, None])[:, 0]
    return {
        "advantages": sk.group_advantages(rewards, groups, scale=case.options["scale"]),
        "sdpo_mask": routing.sdpo_mask.double(),
        "correct": routing.correct.double(),
        "teacher_is_a_correct_sibling": torch.where(routing.teacher_index < 0, ~candidates.any(1), chosen).double(),
    }


def _oracle_routes(case: Case, inputs: Inputs) -> reference.Routing:
    options = case.options["success_threshold"], inputs["feedback_available"]
    return reference.route_samples(inputs["rewards"], inputs["group_ids"], *options)


def oracle_routing(case: Case, inputs: Inputs) -> Results:
    routes = _oracle_routes(case, inputs)
    return {
        "advantages": reference.group_advantages(inputs["rewards"], inputs["group_ids"], case.options["scale"]),
        "sdpo_mask": routes.sdpo_mask.double(),
        "correct": routes.correct.double(),
        "teacher_is_a_correct_sibling": torch.ones(len(routes.correct)),
    }
