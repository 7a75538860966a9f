"""Vision-language models in SRPOTrainer: GRPO on images beside TRL's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")
pytest.importorskip("PIL", reason="images need pillow")

from datasets import Dataset
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.integrations.test_trl_parity import assert_same_run
from tests.tiny_trainer import ScriptedGRPO, ScriptedSRPO, curve, one_correct, tiny_tokenizer, tiny_trainer, train

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}<image> {% else %}{{ block['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def saved_llava(folder: Path) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16),
        text_config=LlamaConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None),
        image_token_index=len(tokenizer) - 1,
        vision_feature_layer=-1,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = LlavaForConditionalGeneration(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    model.save_pretrained(folder)
    crop = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=crop),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def pictures() -> Dataset:
    colours = ["red", "green", "blue", "white"]
    texts = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in texts],
            "image": [Image.new("RGB", (16, 16), colour) for colour in colours],
        }
    )


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_generation": 2},
        pytest.param({"beta": 0.1, "loss_type": "bnpo", "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"importance_sampling_level": "sequence", "loss_type": "grpo"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_grpo_on_images_is_trls(options: dict[str, Any], tmp_path: Path) -> None:
    same: dict[str, Any] = {"model": saved_llava(tmp_path / "model"), "dataset": pictures(), "processing_class": "own"}
    same |= {"scale_rewards": "none", "use_bias_correction_kl": False, "epsilon_high": 0.28, "reward": one_correct}
    same |= {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2}
    theirs = train(ScriptedGRPO, tmp_path / "theirs", **(same | options))
    own = {"method": "grpo", "token_denominator": "generation_batch"}
    ours = train(ScriptedSRPO, tmp_path / "ours", **(same | options | own))
    assert_same_run(theirs, ours)
    assert max(map(abs, curve(ours))) > 0.0


def test_distillation_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method must be 'grpo' with a processor"):
        tiny_trainer(
            ScriptedSRPO, tmp_path, model=saved_llava(tmp_path / "model"), dataset=pictures(), processing_class="own"
        )
