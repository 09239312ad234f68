"""Vision, speech, multimodal, diffusion, time series, and own modules: all but plain text models.

Every number was read off the model's source before any tool of this project ran on it.
"""

from functools import partial

import own_models as own
from entry import Entry
from models import WIDTH, Block, normal, tokens, torch_encoder


def first(out):
    """The first tensor of a tuple or of a library's output object."""
    return out[0]


def itself(out):
    return out


def ids(batch=2, length=8, seed=0):
    return {"idx": tokens(batch, length, seed)}


def states(*names):
    """One [batch, length, WIDTH] input a name, each of another length."""

    def make(batch=2, length=8, seed=0):
        return {
            name: normal(batch, max(2, length - i), WIDTH, seed=seed + 1000 * i)
            for i, name in enumerate(names)
        }

    return make


def positional(batch=2, length=8, seed=0):
    """nn.Sequential names its argument `input`."""
    return {"input": tokens(batch, length, seed)}


def patches(count, name="patches"):
    """A model for a fixed number of tokens: only the batch varies."""
    return lambda batch=2, length=8, seed=0: {name: normal(batch, count, WIDTH, seed=seed)}


def patches_and_condition(batch=2, length=8, seed=0):
    return {
        "patches": normal(batch, length, WIDTH, seed=seed),
        "condition": normal(batch, WIDTH, seed=seed + 1000),
    }


def images(size, name="pixel_values", channels=3):
    return lambda batch=2, length=8, seed=0: {name: normal(batch, channels, size, size, seed=seed)}


def entry(name, make, inputs, sites, why, result=itself, family="own modules", **kwargs):
    return Entry(name, family, make, inputs, sites, why, result, **kwargs)


TWO_BLOCKS = "2 blocks, attention and MLP"
COMPUTED_GATE = "computed"

OWN = (
    entry("residuals in the root", own.RootResiduals, ids, (4,), "the root loops over 4 sublayers"),
    entry("nn.Sequential trunk", own.sequential_trunk, positional, (4,), TWO_BLOCKS),
    entry(
        "nn.TransformerDecoder, post-norm", partial(own.torch_decoder, False),
        states("tgt", "memory"), (6,), "2 layers: self attention, cross attention, MLP",
    ),
    entry(
        "nn.TransformerDecoder, pre-norm", partial(own.torch_decoder, True),
        states("tgt", "memory"), (6,), "2 layers: self attention, cross attention, MLP",
    ),
    entry(
        "nn.TransformerEncoder, pre-norm", partial(torch_encoder, norm_first=True), states("src"),
        (4,), "2 layers: self attention, MLP",
    ),
    entry(
        "nn.Transformer", own.torch_transformer, states("src", "tgt"), (4, 6),
        "encoder 2 x (self, MLP), decoder 2 x (self, cross, MLP)",
    ),
    entry(
        "residual in a wrapper of the sublayer", own.residual_wrappers, ids, (4,),
        "4 wrappers, F(norm(x)) + x each",
    ),
    entry(
        "deferred add-norm, mamba_ssm", lambda: own.DeferredAdds(own.DeferredBlock, 4), ids, (4,),
        "4 mixers: blocks 2 to 4 add the one before them, the final norm adds the last",
    ),
    entry(
        "deferred add-norm, vLLM", lambda: own.DeferredAdds(own.DeferredDecoder, 2), ids, (4,),
        "2 layers, attention and MLP; each MLP is added by what comes next",
    ),
    entry(
        "skip scaled by a parameter", lambda: own.Stack(own.ScaledSkipBlock), ids, (4,),
        "gamma x + F(x), gamma [C] and a scalar, twice in each of 2 blocks",
    ),
    entry(
        "skip scaled by a number", lambda: own.Stack(own.ConstantSkipBlock), ids, (4,),
        "0.9 x + F(x), x / 1.25 + 0.5 F(x), in each of 2 blocks",
    ),
    entry(
        "subtracted branch", lambda: own.Stack(own.SubtractingBlock), ids, (4,),
        "x - F(x) twice in each of 2 blocks",
    ),
    entry("ReZero", lambda: own.Stack(own.ReZeroBlock), ids, (4,), TWO_BLOCKS),
    entry(
        "LayerScale and DropPath", lambda: own.Stack(own.LayerScaleBlock), ids, (4,),
        "2 blocks, an add and an addcmul each",
    ),
    entry(
        "in-place adds", lambda: own.Stack(own.InPlaceBlock), ids, (4,), "x += F(x), x.add_(F(x))"
    ),
    entry("dict plumbing", lambda: own.DictPlumbing(own.DictBlock), ids, (4,), TWO_BLOCKS),
    entry("nested plumbing", lambda: own.NestedPlumbing(own.NestedBlock), ids, (4,), TWO_BLOCKS),
    entry(
        "every block twice in a row", lambda: own.TwicePerBlock(lambda i: Block()), ids, (8,),
        "2 blocks, 2 calls, attention and MLP",
    ),
    entry(
        "universal transformer", own.UniversalTransformer, ids, (6,),
        "1 block, 3 steps, attention and MLP; the time embedding is no residual",
    ),
    entry(
        "blocks in torch.utils.checkpoint", lambda: own.Checkpointed(lambda i: Block()), ids, (4,),
        TWO_BLOCKS,
    ),
    entry("tied blocks", own.tied_blocks, ids, (4,), "2 blocks; the second's MLP is the first's"),
    entry(
        "embedding mixed in again", own.Reinjection, ids, (4,),
        "2 blocks; a x + b x0 before each has no F",
    ),
    entry(
        "additive long skips", own.AdditiveSkips, ids, (8,),
        "4 blocks; the 2 long skips add states, not sublayers",
    ),
    entry(
        "U-ViT", own.UViT, ids, (6, 2, 2),
        "down 2 + middle 1 blocks; each of 2 up blocks starts behind a linear of a concatenation",
    ),
    entry(
        "DenseFormer", own.DenseFormer, ids, (4,), "2 blocks; the averages add states, no sublayers"
    ),
    entry("[L, B, C] layout", own.LengthFirst, ids, (4,), TWO_BLOCKS),
    entry(
        "[B, C, H, W] layout", partial(own.ChannelsFirst, 4), images(16, "image"), (),
        "2 blocks, convolution and 1 x 1 MLP: channels are axis 1", refused=("channel axis", 4),
    ),
    entry(
        "[B, C, C, C] layout", partial(own.ChannelsFirst, 2), images(64, "image"), (),
        "as above with H = W = C, so that sizes cannot tell the axes apart",
        refused=("channel axis", 4),
    ),
    entry("MLP-Mixer", own.Mixer, patches(9), (4,), "2 blocks, along tokens and along channels"),
    entry(
        "MLP-Mixer, tokens = channels", lambda: own.Mixer(WIDTH), patches(WIDTH), (4,),
        "2 blocks; sizes cannot tell tokens from channels",
    ),
    entry(
        "nGPT", lambda: own.Stack(own.NGPTBlock), ids, (4,),
        "2 blocks, attention and MLP: h + a (F(h) - h); the inner difference is part of F",
    ),
    entry(
        "MoE, shared and routed", lambda: own.Stack(own.MoEBlock), ids, (4,),
        "2 blocks; the sums over experts lie inside the second sublayer",
    ),
    entry(
        "latent stream", own.LatentStream, states("data"), (6,),
        "2 x (cross attention, attention, MLP), from a learned start",
    ),
    entry("DiT block", own.DiT, patches_and_condition, (4,), TWO_BLOCKS + ", gated by a condition"),
    entry(
        "gates from a hyper-network", lambda: own.Stack(own.HyperGateBlock), ids, (4,),
        "2 blocks; the gates scale the branches, never the skip",
    ),
    entry(
        "highway gates", lambda: own.Stack(own.HighwayBlock), ids, (),
        "g x + (1 - g) F(x) twice in 2 blocks: the skip is gated by a computed value",
        refused=(COMPUTED_GATE, 4),
    ),
    entry(
        "joint attention", own.JointStreams, states("image", "text"), (4, 4),
        "2 blocks; each stream takes its part of the attention and an MLP of its own",
    ),
    entry("value residual", own.ValueResidual, ids, (4,), TWO_BLOCKS + "; v + m v1 is inside F"),
    entry(
        "reversible halves", lambda: own.Reversible(), ids, (2, 2),
        "2 blocks; attention updates one half, the MLP the other",
    ),
    entry(
        "Conformer block", lambda: own.Stack(own.ConformerBlock), ids, (8,),
        "2 blocks: half MLP, attention, convolution, half MLP; the norm is on the stream",
    ),
    entry(
        "average of layers", own.LayerAverage, ids, (4,), TWO_BLOCKS + "; the head reads all states"
    ),
)  # fmt: skip

ENTRIES: tuple[Entry, ...] = (*OWN,)
