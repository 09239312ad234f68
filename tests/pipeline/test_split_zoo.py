"""Every architecture of the zoo in two stages, compared with the model, or refused by name."""

import sys
from pathlib import Path

import pytest

import mhc_compile as mc

sys.path.insert(0, str(Path(__file__).parents[1] / "zoo"))

from checks import build  # noqa: E402
from test_zoo import ENTRIES  # noqa: E402

# Why a model cannot be cut, and which ones; what `transform` itself refuses is not among them.
REASONS = {
    # The module around all layers computes on the stream, so that it is the one block.
    "calls 1 mHC blocks": (
        "XLNet", "XLM", "FlauBERT", "Funnel", "ALBERT", "mixture of depths", "YOLOS", "wav2vec2",
        "wav2vec2, stable layer norm", "HuBERT", "WavLM", "data2vec audio",
    ),
    # The root does, or it calls the blocks in a checkpoint.
    "is not called in the forward": (
        "residuals in the root", "reversible halves", "average of layers",
        "deferred add-norm, mamba_ssm", "deferred add-norm, vLLM", "every block twice in a row",
        "universal transformer", "blocks in torch.utils.checkpoint", "embedding mixed in again",
        "additive long skips", "U-ViT", "DenseFormer", "HunyuanDiT",
    ),
    # A record within the result.
    "the model returns a BaseModelOutputWithPooling": (
        "CLIP", "SigLIP", "CLIPSeg", "SmolVLM", "Kosmos-2", "BLIP-2",
    ),
    # The root's Python cannot be traced: hooks that collect states, random layer drop, masks.
    "cannot trace": ("DPT", "Llava"),
    "draws Python's random numbers": ("MusicGen decoder",),
    "takes bool() of a tensor": ("Qwen2-Audio",),
}  # fmt: skip
REFUSED = {name: reason for reason, names in REASONS.items() for name in names}


def transformed(entry):
    model, inputs = build(entry).train(), entry.inputs(2, 8, 0)
    try:
        mc.transform(model, example_inputs=inputs, streams=4, strict=False)
    except mc.MHCError:
        pytest.skip("not transformed")
    configs = [getattr(model, "config", None)]
    configs.append(getattr(configs[0], "text_config", None))
    cached = any(hasattr(config, "use_cache") for config in configs)
    return model, {**inputs, "use_cache": False} if cached else inputs


@pytest.mark.long
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_two_stages(entry):
    model, inputs = transformed(entry)
    try:
        stages = mc.split_stages(model, 2, inputs)
    except mc.MHCError as error:
        assert entry.name in REFUSED and REFUSED[entry.name] in str(error)
    else:
        assert entry.name not in REFUSED and len(stages) == 2
