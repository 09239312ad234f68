"""timm's vision transformers; run by `make test-timm`, for timm needs a torchvision of its own."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import timm
import torch
from oracle import Loop
from timm.layers import GatedMlp
from timm.models.focalnet import FocalNet
from timm.models.metaformer import (
    Attention,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    Pooling,
    SepConv,
)
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.nest import Nest
from torch import nn

import mhc_compile as mc
from mhc_compile.errors import NoResidualError

STREAMS = 3


@dataclass(frozen=True)
class Timm:
    """One architecture, tiny, and the residual adds that its source shows.

    Attributes:
        name: timm's.
        kwargs: what makes it small.
        accepted: residual adds that are rewritten.
        why: where the numbers come from.
        refused: (regular expression of the reason, number of adds) where the answer is no.
        size: of the square image.
        id: of the test, if not the name.
        widths: of streams that timm's `feature_info` does not list.
        make: the class, where timm's function of that name fixes what would make it small.
    """

    name: str
    kwargs: dict
    accepted: int
    why: str
    refused: tuple[str, int] | None = None
    size: int = 32
    id: str = ""
    widths: tuple[int, ...] = ()
    make: Callable[..., nn.Module] | None = None


VIT = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
AXIS = "channel|axis"
MIXER = {"img_size": 64, "patch_size": 16, "num_blocks": 2, "embed_dim": 32}
PYRAMID = {"img_size": 64, "window_size": 4, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}

MODELS = [
    Timm("vit_tiny_patch16_224", VIT, 4, "x + attn, x + mlp in each of 2 blocks"),
    Timm("vit_tiny_patch16_224", {**VIT, "init_values": 0.1, "drop_path_rate": 0.3}, 4,
         "the same with LayerScale and DropPath in the branches", id="vit_layerscale_droppath"),
    Timm("vit_base_patch16_rpn_224", VIT, 4, "x + norm(F(x)): norms end the branches"),
    Timm("vit_huge_patch14_xp_224", {**VIT, "img_size": 28}, 2,
         "attention and MLP share one add", size=28),
    Timm("vit_small_patch16_18x2_224", VIT, 4,
         "x + stack([attn, attn]).sum(0), then the MLPs: 2 adds a block"),
    Timm("vit_relpos_small_patch16_224", VIT, 4, "2 a block"),
    Timm("deit_tiny_distilled_patch16_224", VIT, 4,
         "2 a block; the mean of the two heads is no residual"),
    Timm("deit3_small_patch16_224", VIT, 4, "2 a block, LayerScale"),
    Timm("beit_base_patch16_224", VIT, 4, "x + gamma * F(x), 2 a block"),
    Timm("eva02_tiny_patch14_224", {**VIT, "img_size": 28}, 4, "2 a block; rotary embeddings",
         size=28),
    Timm("naflexvit_base_patch16_gap", {"depth": 2, "embed_dim": 32, "num_heads": 2}, 4,
         "vit blocks; the position embedding is added in place before them"),
    Timm("samvit_base_patch16", {**VIT, "window_size": 0, "global_attn_indexes": (0, 1)}, 4,
         "2 a block, one on [B, H, W, C], one on [B, H * W, C]"),
    Timm("swin_tiny_patch4_window7_224", PYRAMID, 8,
         "2 a block, 2 blocks in each of 2 stages; [B, H, W, C] and [B, H * W, C] in turn",
         size=64),
    Timm("swinv2_tiny_window8_256", PYRAMID, 8, "as Swin, with norms at the branches' ends",
         size=64),
    Timm("cait_xxs24_224", {**VIT, "depth_token_only": 1}, 6,
         "2 in each of 2 blocks, and 2 on the class token"),
    Timm("xcit_tiny_12_p16_224", {**VIT, "cls_attn_layers": 1}, 8,
         "3 in each of 2 blocks; 2 in the class block, behind the concatenation"),
    Timm("convit_tiny", {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2,
                         "local_up_to_layer": 1}, 4,
         "2 a block; the class token joins between the two blocks"),
    Timm("mixer_s32_224", MIXER, 4, "tokens and channels, 2 a block", size=64, make=MlpMixer),
    Timm("resmlp_12_224", {**MIXER, "mlp_ratio": 4, "block_layer": ResBlock, "norm_layer": Affine},
         4, "2 a block, Affine for norms", size=64, make=MlpMixer),
    Timm("gmlp_s16_224", {**MIXER, "mlp_ratio": 6, "block_layer": SpatialGatingBlock,
                          "mlp_layer": GatedMlp}, 2, "1 a block", size=64, make=MlpMixer),
    Timm("hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1,
                            "stages": (1, 1, 1, 1)}, 5,
         "2 in the first block; 1 in each later one, whose first skip is pooled", size=64),
    Timm("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, 8, "2 a block", size=64),
    Timm("nest_tiny", {"img_size": 64, "depths": (1, 1, 1), "embed_dims": (16, 32, 64),
                       "num_heads": (1, 2, 4)}, 6, "2 a layer", size=64, make=Nest),
    Timm("pit_ti_224", {"img_size": 64, "depth": (1, 1, 1)}, 6,
         "2 a block; stages end in a pooling", size=64),
    Timm("levit_128s", {"img_size": 64, "depth": (1, 1, 1)}, 8,
         "2 a block; and x + mlp(x) in each of 2 downsamplings", size=64),
    Timm("tnt_s_legacy_patch16_224", {"img_size": 32, "depth": 2}, 8,
         "2 on pixels, 2 on patches a block; patches[:, 1:] + F(pixels) does not read patches",
         widths=(24,)),
    Timm("convnext_atto", {"depths": (1, 1, 1, 1)}, 0, "1 a block on [B, C, H, W]", (AXIS, 4),
         size=64),
    Timm("poolformer_s12", {"depths": (1, 1), "dims": (24, 32), "downsample_norm": None,
                            "mlp_act": nn.GELU, "token_mixers": Pooling,
                            "layer_scale_init_values": 1e-5, "res_scale_init_values": None,
                            "use_mlp_head": False}, 0,
         "2 a block on [B, C, H, W]", (AXIS, 4), size=64, make=MetaFormer),
    Timm("focalnet_tiny_srf", {"depths": (1, 1), "embed_dim": 24}, 0, "2 a block on [B, C, H, W]",
         (AXIS, 4), size=64, make=FocalNet),
    Timm("caformer_s18", {"depths": (1, 1, 1, 1), "dims": (24, 32, 64, 96),
                          "token_mixers": (SepConv, SepConv, Attention, Attention),
                          "norm_layers": (LayerNorm2dNoBias,) * 2 + (LayerNormNoBias,) * 2}, 4,
         "2 a block; [B, C, H, W] in the stages of convolutions, tokens and a learned factor on "
         "the skip in those of attention", (AXIS, 4), size=64, make=MetaFormer),
    Timm("maxvit_tiny_tf_224", {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64),
                                "stem_width": 16, "block_type": ("M", "M")}, 8,
         "4 on [B, H, W, C] in each of 2 blocks; strided convolutions have no plain skip", size=64),
    Timm("coatnet_nano_cc_224", {"img_size": 64, "depths": (2, 2), "embed_dim": (32, 64),
                                 "stem_width": 16, "block_type": ("C", "T")}, 0,
         "on [B, C, H, W]: 1 in the second convolution block, 1 and 2 in the attention blocks",
         (AXIS, 4), size=64),
    Timm("davit_tiny", {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (1, 2)}, 8,
         "x + convolution(x) on [B, C, H, W] and x + F(x) on tokens in turn, 4 adds in each of 2 "
         "blocks a stage", (AXIS, 8), size=64),
]  # fmt: skip


def name_of(entry: Timm) -> str:
    return entry.id or entry.name


def build(entry: Timm) -> nn.Module:
    torch.manual_seed(0)
    make = entry.make or partial(timm.create_model, entry.name, pretrained=False)
    model = make(num_classes=5, **entry.kwargs).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # LayerScale starts at 1e-5 and biases at 0: sublayers must matter as much as skips.
            small = p.dim() < 2 or p.numel() == max(p.shape)
            if small and re.search("gamma|ls|norm.*weight", name):
                p.copy_(torch.rand_like(p) + 0.5)
            else:
                p.add_(torch.randn_like(p) * 0.05)
    return model


def images(entry: Timm, batch: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, entry.size, entry.size, generator=g)


@pytest.mark.parametrize("entry", MODELS, ids=name_of)
def test_sites(entry: Timm) -> None:
    model = build(entry)
    sites = mc.find_residuals(model, (images(entry, 2),))
    no = [s for s in sites if not s.accepted]
    listing = "\n".join(f"{s.name} {s.source} {s.stream} {s.reason}" for s in sites)
    pattern, count = entry.refused or ("", 0)
    assert (len(sites) - len(no), len(no)) == (entry.accepted, count), f"{entry.why}\n{listing}"
    assert all(re.search(pattern, s.reason) for s in no), listing
    # Sizes are chosen such that in most entries no axis of tokens has the length of a width.
    widths = {info["num_chs"] for info in model.feature_info} | set(entry.widths)
    assert {s.channels for s in sites if s.accepted} <= widths, listing


@pytest.mark.parametrize("entry", MODELS, ids=name_of)
def test_function_and_gradients(entry: Timm) -> None:
    model, x, more = build(entry), images(entry, 2), images(entry, 3, seed=1)
    with torch.no_grad():
        before, before_more = model(x), model(more)
    assert before.std() > 1e-3
    if not entry.accepted:
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(NoResidualError, match=AXIS):
            mc.transform(model, streams=STREAMS, example_inputs=(x,), strict=False)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(model(x), before)
        return
    mc.transform(model, streams=STREAMS, example_inputs=(x,), strict=entry.refused is None)
    parameters = dict(mc.mhc_parameters(model))
    assert len({n.rpartition(".")[0] for n in parameters if n.endswith(".phi")}) == entry.accepted
    with torch.no_grad():
        for got, expected in ((model(x), before), (model(more), before_more)):
            scale = float(expected.abs().max())
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * max(scale, 1))
        for p in parameters.values():
            p.add_(torch.randn_like(p) * 0.1)
        assert (model(x) - before).abs().max() > 1e-4 * before.std()
    model.train()
    for m in model.modules():  # 2 images are too few for the statistics of a batch norm
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    out = model(images(entry, 8, seed=2))
    loss = sum(o.square().mean() for o in (out if isinstance(out, tuple) else (out,)))
    loss.backward()
    for name, p in parameters.items():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert model(x).isfinite().all()
    mc.revert(model)
    assert not mc.is_transformed(model)


@torch.no_grad()
def test_vit_equals_a_loop() -> None:
    """Perturbed connections around LayerScale branches, against a loop of its own code."""
    entry = next(e for e in MODELS if e.id == "vit_layerscale_droppath")
    model, x = build(entry), images(entry, 2)
    plain = copy.deepcopy(model)
    mc.transform(model, streams=STREAMS, example_inputs=(x,))
    for _, p in mc.mhc_parameters(model):
        p.add_(torch.randn_like(p) * 0.3)
    sublayers = []
    for k, block in enumerate(plain.blocks):
        sublayers += [
            (f"blocks.{k}.mhc.0", lambda h, b=block: b.ls1(b.attn(b.norm1(h))), None),
            (f"blocks.{k}.mhc.1", lambda h, b=block: b.ls2(b.mlp(b.norm2(h))), None),
        ]
    tokens = plain.norm_pre(plain._pos_embed(plain.patch_embed(x)))
    expected = plain.forward_head(plain.norm(Loop(model, STREAMS)(tokens, sublayers)))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain(x)).abs().max() > 1e-2
