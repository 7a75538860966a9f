"""Vision-language models in SRPOTrainer: GRPO on images beside TRL's own, and a teacher that is shown them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")
pytest.importorskip("PIL", reason="images need pillow")

from trl.data_utils import prepare_multimodal_messages

import reference
from srpo_kernels.integrations.transformers.solutions import teacher_prompt
from srpo_kernels.integrations.trl.images import image_inputs, teacher_token_types, with_an_image
from tests.integrations.test_trl_parity import assert_same_run
from tests.integrations.test_trl_trainer import scored_batch
from tests.tiny_pictures import KINDS, hidden_alone, saved_pictures
from tests.tiny_trainer import ScriptedGRPO, ScriptedSRPO, completion, curve, one_correct, tiny_trainer, train


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llava", {"steps_per_generation": 2}),
        ("qwen2_vl", {"loss_type": "bnpo", "gradient_accumulation_steps": 2}),
        ("gemma3", {"beta": 0.1}),
        pytest.param("qwen2_vl", {"top_entropy_quantile": 0.5}, marks=pytest.mark.slow),
        pytest.param("qwen2_vl", {"beta": 0.1, "pad_to_multiple_of": 8}, marks=pytest.mark.slow),
        pytest.param("llava", {"importance_sampling_level": "sequence", "loss_type": "grpo"}, marks=pytest.mark.slow),
        pytest.param("gemma3", {"entropy_coef": 0.01}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_grpo_on_images_is_trls(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    same: dict[str, Any] = saved_pictures(kind, tmp_path / "model")
    same |= {"scale_rewards": "none", "use_bias_correction_kl": False, "epsilon_high": 0.28, "reward": one_correct}
    # Adam would scale the rounding of a gradient that is all but 0.
    same |= {"num_iterations": 2, "max_steps": 4, "learning_rate": 0.1, "optim": "sgd"}
    theirs = train(ScriptedGRPO, tmp_path / "theirs", **(same | options))
    own = {"method": "grpo", "token_denominator": "generation_batch"}
    ours = train(ScriptedSRPO, tmp_path / "ours", **(same | options | own))
    assert_same_run(theirs, ours)
    assert max(map(abs, curve(ours))) > 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["srpo", "sdpo"])
def test_the_teacher_is_shown_the_images(kind: str, method: str, tmp_path: Path) -> None:
    options = saved_pictures(kind, tmp_path / "model")
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, reward=one_per_group, method=method, **options)
    teacher64 = copy.deepcopy(trainer.model).double().eval()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = scored_batch(trainer)
    distilled = torch.arange(16) % 4 > 0
    assert torch.equal(batch["sdpo_mask"], distilled)
    assert batch["num_images"] == [1] * 8 + [2] * 4 + [1] * 4

    student64 = copy.deepcopy(trainer.model).double()
    length = batch["completion_ids"].shape[1]
    prompts, taught, hidden = [], [], []
    for row in range(16):
        example = trainer.train_dataset[row // 4]
        prompts.append(prepare_multimodal_messages(example["prompt"], images=example["images"]))
        ids = completion(0, row)
        states = hidden_alone(student64, trainer.processing_class, prompts[row], ids)
        hidden.append(torch.nn.functional.pad(states, (0, 0, 0, length - len(ids))))
        if distilled[row]:
            solution = trainer._tokenizer.decode(completion(0, row // 4 * 4), skip_special_tokens=True)
            solution = trainer.args.solution_template.format(solution=solution)
            shown = teacher_prompt(prompts[row], trainer.args.teacher_template, solution=solution, feedback="")
            states = hidden_alone(teacher64, trainer.processing_class, shown, ids)
            taught.append(torch.nn.functional.pad(states, (0, 0, 0, length - len(ids))))
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(
        batch["teacher"].hidden, torch.stack(taught)[mask[distilled]].float(), rtol=1e-4, atol=1e-5
    )
    expected = reference.srpo_loss(
        torch.stack(hidden),
        student64.lm_head.weight,
        batch["completion_ids"],
        advantages=batch["advantages"].double(),
        mask=mask,
        sdpo_mask=distilled,
        teacher_hidden=torch.stack(taught),
        teacher_weight=teacher64.lm_head.weight,
        config=trainer.loss_config,
    ).loss
    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        gradient = student64.get_parameter(name).grad
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient.float(), rtol=1e-3, atol=1e-5, msg=name)


def one_per_group(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 for the first completion of every group of four."""
    return [float(index % 4 == 0) for index in range(len(completion_ids))]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_take_their_own_images_along(kind: str, tmp_path: Path) -> None:
    options = saved_pictures(kind, tmp_path / "model")
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, reward=one_per_group, method="grpo", log_entropy=False, **options)
    batch = scored_batch(trainer)
    # A group has the images of its prompt, as many rows as they have.
    first, third = (image_inputs(batch, torch.arange(start, start + 4))["pixel_values"] for start in (0, 8))
    picked = image_inputs(batch, torch.tensor([9, 1]))["pixel_values"]
    assert torch.equal(picked, torch.cat([third[: len(third) // 4], first[: len(first) // 4]]))

    pixels: list[int] = []
    tower = trainer.model.model.get_submodule("visual" if kind == "qwen2_vl" else "vision_tower")
    tower.register_forward_pre_hook(
        lambda _, args, kwargs: pixels.append(len([*args, *kwargs.values()][0])), with_kwargs=True
    )
    batch["advantages"] = torch.zeros(16)
    batch["advantages"][[1, 9]] = 1.0
    trainer._compute_loss(trainer.model, batch)
    assert pixels == [len(picked)]


def test_a_micro_batch_with_images_has_one_in_every_forward() -> None:
    """DDP waits for the gradients of the vision tower."""
    batch = {"pixel_values": torch.randn(3, 2), "num_images": [0, 1, 0, 2], "mm_token_type_ids": torch.zeros(4, 5)}
    rows = torch.tensor([True, False, True, False])
    assert with_an_image(rows, batch).tolist() == [True, True, True, False]
    assert with_an_image(~rows, batch).tolist() == [False, True, False, True]
    assert torch.equal(with_an_image(rows, batch | {"num_images": [0] * 4}), rows)
    assert torch.equal(with_an_image(rows, {}), rows)
    assert image_inputs(batch, torch.tensor([2, 0])).keys() == {"mm_token_type_ids"}
    assert torch.equal(image_inputs(batch, torch.tensor([3, 0]))["pixel_values"], batch["pixel_values"][1:])


def test_distillation_trains_on_images(tmp_path: Path) -> None:
    options = saved_pictures("qwen2_vl", tmp_path / "model")
    options |= {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 3, "beta": 0.1}
    for name, method in (("srpo", "srpo"), ("trls", "srpo"), ("other", "distill")):
        own: dict[str, Any] = {"trls": {"top_entropy_quantile": 0.5}, "other": {"beta": 0.0}}.get(name, {})
        if method == "distill":
            own["teacher_model_name_or_path"] = options["model"]
        trainer = train(ScriptedSRPO, tmp_path / name, reward=one_correct, method=method, **(options | own))
        assert curve(trainer, "srpo/sdpo_token_fraction")[0] > 0.0
        assert all(abs(value) < 100.0 for value in curve(trainer))


def test_a_solution_that_says_an_image_is_not_shown(tmp_path: Path) -> None:
    options = saved_pictures("gemma3", tmp_path / "model")
    trainer = tiny_trainer(ScriptedSRPO, tmp_path, **options)
    prompt = [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]
    for word, is_shown in (("w3", True), ("<image>", False), ("<soft>", False)):
        trainer._solutions.texts = lambda completions, word=word: [word]
        assert (trainer._solutions.prompts([prompt], [[8, 1]], [True], [4])[0] is not None) is is_shown


def test_a_processor_of_other_token_types_is_refused() -> None:
    _, processor = KINDS["qwen2_vl"]()
    image = processor.image_token_id
    batch = {"prompt_ids": torch.tensor([[0, 8, image, 9]]), "prompt_mask": torch.tensor([[0, 1, 1, 1]])}
    batch["mm_token_type_ids"] = torch.tensor([[0, 0, 1, 0, 0, 0]])
    types = teacher_token_types(batch, processor, [[image, image, 8]])
    assert types == {"teacher_mm_token_type_ids": [[1, 1, 0]]}
    assert teacher_token_types(batch, processor, [[]]) == {"teacher_mm_token_type_ids": [[0, 1, 0]]}
    batch["mm_token_type_ids"][0, 1] = 1
    with pytest.raises(ValueError, match=r"processing_class must mark the tokens of images .* mm_token_type_ids"):
        teacher_token_types(batch, processor, [[]])
