"""Vision, speech, multimodal, diffusion, time series, and own modules: all but plain text models.

Every number was read off the model's source before any tool of this project ran on it.
"""

from functools import partial
from importlib.util import find_spec

import own_models as own
import torch
import transformers as hf
from entry import Entry
from models import SPREAD, VOCABULARY, WIDTH, Block, normal, tokens, torch_encoder


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
        "in-place adds", lambda: own.Stack(own.InPlaceBlock), ids, (4,),
        "2 blocks: F(x) += x, F(x).add_(x)",
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
    entry(
        "MLP-Mixer", own.Mixer, patches(9), (4,), "2 blocks, along tokens and along channels",
        # A bias of the token mixing shifts all channels of a token, which the norms take out: its
        # true gradient is 0 (4e-17 in float64) and only rounding is compared.
        loose=3,
    ),
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
    entry("lerp", lambda: own.Stack(own.LerpBlock), ids, (4,), TWO_BLOCKS + ": (1 - w) x + w F(x)"),
    entry("sum of a list", lambda: own.Stack(own.SummedListBlock), ids, (4,), TWO_BLOCKS,
          no_reference="the add is inside Python's sum"),
    entry(
        "add inside a matrix product", lambda: own.Stack(own.FusedProductBlock), ids, (2,),
        "2 blocks; the MLP's residual goes into addmm and stays plain",
        refused=("fused matrix product", 2),
        no_reference="streams end at each refused add",
    ),
    entry(
        "mixture of depths",
        lambda: own.Stack(lambda i: own.SomeTokensBlock() if i == 1 else Block(), depth=2), ids,
        (2,), "a plain block before one that adds to some tokens only",
        refused=("tokens", 1),
    ),
    entry(
        "class token left out", lambda: own.Stack(own.ClassTokenBlock), ids, (4,),
        TWO_BLOCKS + "; the attention's residual is on all tokens but the first",
    ),
    entry(
        "NamedTuple plumbing", lambda: own.NamedTuplePlumbing(own.NamedTupleBlock), ids, (4,),
        TWO_BLOCKS,
    ),
    entry(
        "average of layers", own.LayerAverage, ids, (4,), TWO_BLOCKS + "; the head reads all states"
    ),
)  # fmt: skip

# Names of sizes in most configs; every model has two layers unless its entry says otherwise.
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": SPREAD,
}  # fmt: skip
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4, "num_channels": 3}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {**SIZES, "vocab_size": VOCABULARY + 3, "max_position_embeddings": 64}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IMAGE_TOKEN = VOCABULARY
TWO_LAYERS = "2 layers, attention and MLP"
BOTH = "2 layers of vision and of text, attention and MLP"


def silent(model):
    """generate() must not write tokens that stand for images."""
    model.generation_config.suppress_tokens = [IMAGE_TOKEN, IMAGE_TOKEN + 1, IMAGE_TOKEN + 2]
    return model


def hugging_face(name, config, **kwargs):
    """`hf.<name>` from `hf.<config>(**kwargs)`."""
    return lambda: getattr(hf, name)(getattr(hf, config)(**kwargs))


def vision(name, make, inputs, sites, why, result=first, **kwargs):
    return entry(name, make, inputs, sites, why, result, "vision", **kwargs)


def dpt():
    model = hugging_face(
        "DPTForDepthEstimation", "DPTConfig", **{**IMAGE, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16, is_hybrid=False,
    )()  # fmt: skip
    with torch.no_grad():  # depths end in a ReLU, which may be 0 everywhere
        model.head.head[-2].bias.fill_(3.0)
    return model


VISION = (
    vision("ViT", hugging_face("ViTModel", "ViTConfig", **IMAGE), images(16), (4,), TWO_LAYERS),
    vision("DeiT", hugging_face("DeiTModel", "DeiTConfig", **IMAGE), images(16), (4,), TWO_LAYERS),
    vision(
        "BEiT",
        hugging_face(
            "BeitModel", "BeitConfig", **IMAGE, layer_scale_init_value=0.3,
            use_relative_position_bias=True,
        ),
        images(16), (4,), TWO_LAYERS + ", each scaled by a parameter",
    ),
    vision(
        "DINOv2", hugging_face("Dinov2Model", "Dinov2Config", **IMAGE, layerscale_value=0.3),
        images(16), (4,), TWO_LAYERS + ", each scaled by a parameter",
    ),
    vision(
        "DINOv3 ViT",
        hugging_face(
            "DINOv3ViTModel", "DINOv3ViTConfig", **IMAGE, layerscale_value=0.3,
            num_register_tokens=2, drop_path_rate=0.1,
        ),
        images(16), (4,), TWO_LAYERS + ", each scaled by a parameter",
    ),
    vision("I-JEPA", hugging_face("IJepaModel", "IJepaConfig", **IMAGE), images(16), (4,),
           TWO_LAYERS),
    vision(
        "Swin",
        hugging_face(
            "SwinModel", "SwinConfig", image_size=32, patch_size=2, embed_dim=WIDTH,
            depths=[2, 2], num_heads=[2, 4], window_size=4, initializer_range=SPREAD,
        ),
        images(32), (4, 4),
        "2 stages of 2 layers; between them patches are merged by a linear",
    ),
    vision(
        "SwinV2",
        hugging_face(
            "Swinv2Model", "Swinv2Config", image_size=32, patch_size=2, embed_dim=WIDTH,
            depths=[2, 2], num_heads=[2, 4], window_size=4, initializer_range=SPREAD,
        ),
        images(32), (4, 4),
        "2 stages of 2 layers, norms at the end of the branches",
    ),
    vision(
        "ViTMAE",
        hugging_face(
            "ViTMAEForPreTraining", "ViTMAEConfig", **IMAGE, decoder_hidden_size=WIDTH,
            decoder_intermediate_size=64, decoder_num_hidden_layers=2,
            decoder_num_attention_heads=4, mask_ratio=0.5,
        ),
        lambda batch=2, length=8, seed=0: {
            "pixel_values": normal(batch, 3, 16, 16, seed=seed),
            "noise": normal(batch, 16, seed=seed + 1000),
        },
        (4, 4), "encoder and decoder of 2 layers; a linear between them",
        result=lambda out: out.logits,
    ),
    vision(
        "Hiera",
        hugging_face(
            "HieraModel", "HieraConfig", image_size=[32, 32], patch_size=[7, 7],
            patch_stride=[4, 4], patch_padding=[3, 3], embed_dim=WIDTH, depths=[2, 2],
            num_heads=[2, 4], query_stride=[2, 2], num_query_pool=1, masked_unit_size=[4, 4],
            masked_unit_attention=[True, False], initializer_range=SPREAD,
        ),
        images(32), (4, 3),
        "2 stages of 2 layers; the first attention of stage 2 has a projected shortcut",
    ),
    vision(
        "PVTv2",
        hugging_face(
            "PvtV2Model", "PvtV2Config", image_size=32, num_encoder_blocks=2, depths=[2, 2],
            sr_ratios=[2, 1], hidden_sizes=[16, WIDTH], patch_sizes=[7, 3], strides=[4, 2],
            num_attention_heads=[2, 4], mlp_ratios=[2, 2], initializer_range=SPREAD,
        ),
        images(32), (4, 4), "2 stages of 2 layers; a convolution embeds patches in between",
    ),
    vision(
        "SegFormer",
        hugging_face(
            "SegformerModel", "SegformerConfig", num_encoder_blocks=2, depths=[2, 2],
            sr_ratios=[2, 1], hidden_sizes=[16, WIDTH], patch_sizes=[7, 3], strides=[4, 2],
            num_attention_heads=[2, 4], mlp_ratios=[2, 2], initializer_range=SPREAD,
        ),
        images(32), (4, 4), "2 stages of 2 layers; a convolution embeds patches in between",
    ),
    vision(
        "DPT",
        dpt,
        images(16), (8,),
        "4 layers, all read by the neck; its 4 fusion layers hold 1 + 3 x 2 residual units of "
        "convolutions",
        refused=("channel axis", 7),
    ),
    vision(
        "DETR",
        lambda: hf.DetrForObjectDetection(
            hf.DetrConfig(
                use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                backbone_config=hf.ResNetConfig(
                    embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic",
                    out_features=["stage2"],
                ),
                d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5,
                init_std=SPREAD,
            )
        ),
        lambda batch=2, length=8, seed=0: {
            **images(64)(batch, length, seed),
            # DETR's own zeros would give the first connection's phi no gradient.
            "decoder_inputs_embeds": normal(batch, 5, WIDTH, seed=seed + 1000),
        },
        (4, 6),
        "encoder 2 x 2, decoder 2 x 3; the ResNet has 2 + 1 units without projection",
        result=lambda out: out.logits, refused=("channel axis", 3),
    ),
    vision(
        "YOLOS",
        hugging_face(
            "YolosModel", "YolosConfig", **{**IMAGE, "image_size": [16, 16]},
            num_detection_tokens=3, use_mid_position_embeddings=True,
        ),
        images(16), (4,), TWO_LAYERS + "; positions are added to the stream between them",
    ),
    vision(
        "LeViT",
        hugging_face(
            "LevitModel", "LevitConfig", image_size=128, hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
            initializer_range=SPREAD,
        ),
        images(128), (2, 3, 3),
        "3 stages of attention and MLP; stages 2 and 3 also get an MLP behind the subsampling",
    ),
    vision(
        "PoolFormer",
        hugging_face(
            "PoolFormerModel", "PoolFormerConfig", num_encoder_blocks=2, depths=[1, 1],
            hidden_sizes=[16, WIDTH], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1],
            layer_scale_init_value=0.3,
        ),
        images(32), (), "2 stages of 1 layer, pooling and MLP, [B, C, H, W]",
        refused=("channel axis", 4),
    ),
    vision(
        "ConvNeXt",
        hugging_face(
            "ConvNextModel", "ConvNextConfig", num_stages=2, depths=[2, 2],
            hidden_sizes=[16, WIDTH], layer_scale_init_value=0.3,
        ),
        images(32), (), "2 stages of 2 layers, [B, C, H, W]", refused=("channel axis", 4),
    ),
    vision(
        "Perceiver",
        hugging_face(
            "PerceiverModel", "PerceiverConfig", num_latents=6, d_latents=WIDTH, d_model=WIDTH,
            num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
            num_cross_attention_heads=4, initializer_range=SPREAD,
        ),
        states("inputs"), (6,),
        "cross attention, MLP, 2 x (attention, MLP) on learned latents",
    ),
    vision(
        "VideoMAE",
        hugging_face("VideoMAEModel", "VideoMAEConfig", **IMAGE, num_frames=4, tubelet_size=2),
        lambda batch=2, length=8, seed=0: {"pixel_values": normal(batch, 4, 3, 16, 16, seed=seed)},
        (4,), TWO_LAYERS,
    ),
    vision(
        "TimeSformer",
        hugging_face(
            "TimesformerModel", "TimesformerConfig", **IMAGE, num_frames=2,
        ),
        lambda batch=2, length=8, seed=0: {"pixel_values": normal(batch, 2, 3, 16, 16, seed=seed)},
        (1, 1),
        "2 layers, an MLP in each; the temporal attention is added to all but the class token, the "
        "spatial one to a state put together anew, which is refused",
        refused=("cut or joined", 4),
    ),
    vision(
        "Segment Anything",
        lambda: hf.SamModel(hf.SamConfig(
            vision_config={
                "hidden_size": WIDTH, "output_channels": WIDTH, "num_hidden_layers": 2,
                "num_attention_heads": 4, "image_size": 32, "patch_size": 4, "mlp_dim": 64,
                "window_size": 3, "global_attn_indexes": [1], "initializer_range": SPREAD,
                "num_pos_feats": 16,
            },
            prompt_encoder_config={
                "hidden_size": WIDTH, "image_size": 32, "patch_size": 4, "mask_input_channels": 4,
            },
            mask_decoder_config={
                "hidden_size": WIDTH, "mlp_dim": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "iou_head_hidden_dim": 16,
            },
        )),
        lambda batch=2, length=8, seed=0: {
            **images(32)(batch, length, seed),
            "input_points": normal(batch, 1, 2, 2, seed=seed + 1000).abs() * 8,
        },
        (4, 6, 2),
        "vision of 2 layers, in windows; decoder: queries get cross attention and MLP, then self "
        "attention, cross attention, MLP and a last attention; the image one attention a layer",
        result=lambda out: out.pred_masks,
    ),
    vision(
        "CLIP",
        lambda: hf.CLIPModel(hf.CLIPConfig(
            text_config={**TEXT, **IDS}, vision_config=IMAGE, projection_dim=16,
        )),
        lambda batch=2, length=8, seed=0: {
            **images(16)(batch, length, seed), "input_ids": tokens(batch, length, seed),
        },
        (4, 4), BOTH, result=lambda out: out.logits_per_image,
    ),
    vision(
        "SigLIP",
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config={**TEXT, **IDS}, vision_config=IMAGE)),
        lambda batch=2, length=8, seed=0: {
            **images(16)(batch, length, seed), "input_ids": tokens(batch, length, seed),
        },
        (4, 1, 4), BOTH + "; the pooling head has an MLP behind its attention",
        result=lambda out: out.logits_per_image,
    ),
    vision(
        "CLIPSeg",
        lambda: hf.CLIPSegModel(hf.CLIPSegConfig(
            text_config={**TEXT, **IDS}, vision_config=IMAGE, projection_dim=16,
        )),
        lambda batch=2, length=8, seed=0: {
            **images(16)(batch, length, seed), "input_ids": tokens(batch, length, seed),
        },
        (4, 4), BOTH, result=lambda out: out.logits_per_image,
    ),
)  # fmt: skip


def logits(out):
    return out.logits


def last(out):
    return out.last_hidden_state


def waves(batch=2, length=8, seed=0):
    """Raw audio for two convolutions of stride 4 and 2."""
    return {"input_values": normal(batch, 8 * length + 64, seed=seed)}


def features(name, bins, frames=None, decoder=True, **more):
    """[batch, frames, bins] features; a decoder's tokens are `length` long."""

    def make(batch=2, length=8, seed=0):
        inputs = {name: normal(batch, frames or 2 * length + 8, bins, seed=seed)}
        if decoder:
            inputs["decoder_input_ids"] = tokens(batch, length, seed)
        return {**inputs, **more}

    return make


def mel(batch=2, length=8, seed=0):
    """Whisper takes [batch, bins, frames], of one fixed length."""
    return {
        "input_features": normal(batch, 8, 40, seed=seed),
        "decoder_input_ids": tokens(batch, length, seed),
    }


# Layer drop leaves layers out of a training step, so that their parameters get no gradient; a
# dropout on the stream itself draws a mask for each of n streams, so that no run without them
# has the same masks.
WAVE = {
    **SIZES, "vocab_size": 32, "conv_dim": [16, 16], "conv_kernel": [8, 4], "conv_stride": [4, 2],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "layerdrop": 0.0,
    "hidden_dropout": 0.0,
}  # fmt: skip
ENCODER_DECODER = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip
WITH_CONVOLUTION = "x + convolution(x) for positions, then 2 layers of attention and MLP"
SEQ2SEQ = "encoder 2 x (self, MLP), decoder 2 x (self, cross, MLP)"

speech = partial(entry, family="speech and audio")

SPEECH = (
    speech(
        "Whisper",
        hugging_face(
            "WhisperForConditionalGeneration", "WhisperConfig", **ENCODER_DECODER, d_model=WIDTH,
            vocab_size=VOCABULARY, num_mel_bins=8, max_source_positions=20,
            max_target_positions=64, init_std=SPREAD, **IDS, decoder_start_token_id=2,
            suppress_tokens=None, begin_suppress_tokens=None,
        ),
        mel, (4, 6), SEQ2SEQ, logits, generate=("greedy", "beam", "static_cache"),
    ),
    speech(
        "Speech2Text",
        hugging_face(
            "Speech2TextForConditionalGeneration", "Speech2TextConfig", **ENCODER_DECODER,
            d_model=WIDTH, vocab_size=VOCABULARY, input_feat_per_channel=8, conv_channels=16,
            max_source_positions=64, max_target_positions=64, init_std=SPREAD, **IDS,
            decoder_start_token_id=0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
        ),
        features("input_features", 8), (4, 6), SEQ2SEQ, logits, generate=("greedy", "beam"),
    ),
    speech("wav2vec2", hugging_face("Wav2Vec2Model", "Wav2Vec2Config", **WAVE), waves, (5,),
           WITH_CONVOLUTION + ", post-norm", last),
    speech(
        "wav2vec2, stable layer norm",
        hugging_face(
            "Wav2Vec2Model", "Wav2Vec2Config", **WAVE, do_stable_layer_norm=True,
            feat_extract_norm="layer",
        ),
        waves, (5,), WITH_CONVOLUTION + ", pre-norm", last,
    ),
    speech("HuBERT", hugging_face("HubertModel", "HubertConfig", **WAVE), waves, (5,),
           WITH_CONVOLUTION, last),
    speech("WavLM", hugging_face("WavLMModel", "WavLMConfig", **WAVE), waves, (5,),
           WITH_CONVOLUTION, last),
    speech(
        "data2vec audio",
        hugging_face(
            "Data2VecAudioModel", "Data2VecAudioConfig", **{**WAVE, "num_conv_pos_embeddings": 2},
            conv_pos_kernel_size=3,
        ),
        waves, (5,), WITH_CONVOLUTION, last,
    ),
    speech(
        "SEW", hugging_face("SEWModel", "SEWConfig", **WAVE), waves, (4,),
        TWO_LAYERS + "; positions are added to a pooled state, which they do not depend on", last,
    ),
    speech(
        "wav2vec2 Conformer",
        hugging_face(
            "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", **WAVE,
            position_embeddings_type="relative", conv_depthwise_kernel_size=3,
        ),
        waves, (8,), "2 layers: half MLP, attention, convolution, half MLP", last,
    ),
    speech(
        "Parakeet",
        hugging_face(
            "ParakeetEncoder", "ParakeetEncoderConfig", **SIZES, num_mel_bins=8,
            subsampling_factor=2, subsampling_conv_channels=8, conv_kernel_size=3, layerdrop=0.0,
        ),
        features("input_features", 8, decoder=False), (8,),
        "2 layers: half MLP, attention, convolution, half MLP", last,
        # The convolution's bias stands before a batch norm: its true gradient is 0 (2e-14 in
        # float64) and only rounding is compared.
        loose=10,
    ),
    speech(
        "Audio Spectrogram Transformer",
        hugging_face(
            "ASTModel", "ASTConfig", **SIZES, patch_size=4, frequency_stride=4, time_stride=4,
            max_length=24, num_mel_bins=8,
        ),
        features("input_values", 8, 24, decoder=False), (4,), TWO_LAYERS, last,
    ),
    speech(
        "SpeechT5",
        hugging_face(
            "SpeechT5ForSpeechToText", "SpeechT5Config", **{**ENCODER_DECODER, **WAVE},
            **IDS, decoder_start_token_id=0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
            max_text_positions=64, encoder_max_relative_position=8,
        ),
        lambda batch=2, length=8, seed=0: {
            **waves(batch, length, seed),
            "decoder_input_ids": tokens(batch, length, seed).remainder(32),
        },
        (5, 6), "x + convolution(x) in the prenet; " + SEQ2SEQ, logits,
        generate=("greedy", "beam"),
    ),
    speech(
        "Moonshine",
        hugging_face(
            "MoonshineForConditionalGeneration", "MoonshineConfig", hidden_size=WIDTH,
            intermediate_size=64, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4, decoder_num_attention_heads=4,
            max_position_embeddings=64, vocab_size=VOCABULARY, initializer_range=SPREAD, **IDS,
            decoder_start_token_id=2,
        ),
        lambda batch=2, length=8, seed=0: {
            "input_values": normal(batch, 2048 + 384 * length, seed=seed),
            "decoder_input_ids": tokens(batch, length, seed),
        },
        (4, 6), SEQ2SEQ, logits, generate=("greedy", "beam", "static_cache"),
    ),
    speech(
        "SeamlessM4T",
        hugging_face(
            "SeamlessM4TForSpeechToText", "SeamlessM4TConfig", **ENCODER_DECODER,
            hidden_size=WIDTH, vocab_size=VOCABULARY, max_position_embeddings=64,
            speech_encoder_layers=2, speech_encoder_attention_heads=4,
            speech_encoder_intermediate_size=64, speech_encoder_layerdrop=0.0,
            encoder_layerdrop=0.0, decoder_layerdrop=0.0, feature_projection_input_dim=8,
            conv_depthwise_kernel_size=3, adaptor_kernel_size=2, adaptor_stride=2,
            initializer_range=SPREAD, **IDS, decoder_start_token_id=2, max_source_positions=64,
        ),
        features("input_features", 8), (9, 1, 6),
        "2 x (half MLP, attention, convolution, half MLP) + MLP; adapter: its attention's "
        "shortcut is a convolution, then an MLP; decoder 2 x 3",
        logits,
    ),
    speech(
        "MusicGen decoder",
        hugging_face(
            "MusicgenForCausalLM", "MusicgenDecoderConfig", vocab_size=VOCABULARY,
            hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, num_codebooks=2, initializer_factor=SPREAD,
            layerdrop=0.0, pad_token_id=2, bos_token_id=2,
        ),
        lambda batch=2, length=8, seed=0: {
            "input_ids": tokens(2 * batch, length, seed),
            "encoder_hidden_states": normal(batch, 5, WIDTH, seed=seed),
        },
        (6,), "2 layers: self attention, cross attention, MLP", logits,
    ),
    speech(
        "Qwen2-Audio",
        lambda: hf.Qwen2AudioForConditionalGeneration(hf.Qwen2AudioConfig(
            audio_config={
                "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 4,
                "encoder_ffn_dim": 64, "d_model": WIDTH, "max_source_positions": 20,
                "initializer_range": SPREAD,
            },
            text_config={**TEXT, **IDS, "model_type": "qwen2", "num_key_value_heads": 2},
            audio_token_index=IMAGE_TOKEN,
        )),
        lambda batch=2, length=8, seed=0: {
            "input_features": normal(batch, 8, 40, seed=seed),
            "feature_attention_mask": torch.ones(batch, 40, dtype=torch.long),
            **with_images(10, batch, length, seed),
        },
        (4, 4), "audio encoder and language model of 2 layers, attention and MLP", logits,
        generate=("greedy", "beam"),
    ),
)  # fmt: skip


def with_images(count, batch=2, length=8, seed=0, before=(), after=()):
    """`count` image tokens, then text."""
    lead = torch.tensor([*before, *[IMAGE_TOKEN] * count, *after], dtype=torch.long)
    ids = torch.cat([lead.expand(batch, -1), tokens(batch, length, seed)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_and_text(count, size=16, extra=(), **kwargs):
    """One image a text; `extra` are more dimensions of the pixels, such as images a text."""

    def make(batch=2, length=8, seed=0):
        return {
            "pixel_values": normal(batch, *extra, 3, size, size, seed=seed),
            **with_images(count, batch, length, seed, **kwargs),
        }

    return make


def qwen2_vl(batch=2, length=8, seed=0):
    """4 x 4 patches an image, of which 2 x 2 are merged into a token."""
    inputs = with_images(4, batch, length, seed, before=[98], after=[99])
    return {
        **inputs,
        "pixel_values": normal(16 * batch, 3 * 2 * 4 * 4, seed=seed),
        "image_grid_thw": torch.tensor([[1, 4, 4]]).expand(batch, -1),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long(),
    }


def kosmos2(batch=2, length=8, seed=0):
    inputs = image_and_text(4)(batch, length, seed)
    inputs["image_embeds_position_mask"] = (inputs["input_ids"] == IMAGE_TOKEN).long()
    return inputs


def llama_text(**kwargs):
    return {**TEXT, **IDS, "model_type": "llama", "num_key_value_heads": 2, **kwargs}


def multimodal(name, make, inputs, sites, why, result=logits, generate=(), **kwargs):
    build = (lambda: silent(make())) if generate else make
    return entry(name, build, inputs, sites, why, result, "multimodal", generate=generate, **kwargs)


MULTIMODAL = (
    multimodal(
        "Llava",
        lambda: hf.LlavaForConditionalGeneration(hf.LlavaConfig(
            vision_config={**IMAGE, "model_type": "clip_vision_model", "num_hidden_layers": 3},
            text_config=llama_text(), image_token_index=IMAGE_TOKEN,
        )),
        image_and_text(16), (4, 4),
        "vision: 2 of 3 layers count, as Llava takes the state before the last; text: 2 layers",
        generate=("greedy", "beam", "static_cache"),
    ),
    multimodal(
        "PaliGemma",
        lambda: hf.PaliGemmaForConditionalGeneration(hf.PaliGemmaConfig(
            vision_config={
                **IMAGE, "model_type": "siglip_vision_model", "vision_use_head": False,
                "projection_dim": WIDTH,
            },
            text_config={
                **TEXT, **IDS, "model_type": "gemma", "num_key_value_heads": 2, "head_dim": 8,
            },
            image_token_index=IMAGE_TOKEN, projection_dim=WIDTH,
        )),
        lambda batch=2, length=8, seed=0: {
            **(inputs := image_and_text(16)(batch, length, seed)),
            "token_type_ids": (inputs["input_ids"] != IMAGE_TOKEN).long(),
        },
        (4, 4), BOTH, generate=("greedy", "beam"),
    ),
    multimodal(
        "Qwen2-VL",
        lambda: hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(
            vision_config={
                "depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4,
                "patch_size": 4, "mlp_ratio": 2, "initializer_range": SPREAD,
            },
            text_config={
                **TEXT, **IDS, "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                    "rope_theta": 1e4},
            },
            image_token_id=IMAGE_TOKEN, video_token_id=3, vision_start_token_id=98,
            vision_end_token_id=99,
        )),
        qwen2_vl, (4, 4), BOTH, generate=("greedy", "beam"),
    ),
    multimodal(
        "InternVL",
        lambda: hf.InternVLForConditionalGeneration(hf.InternVLConfig(
            vision_config={**IMAGE, "image_size": [16, 16], "patch_size": [4, 4]},
            text_config=llama_text(), image_token_id=IMAGE_TOKEN, image_seq_length=4,
        )),
        image_and_text(4), (4, 4), BOTH + "; the vision branches are scaled by parameters",
        generate=("greedy", "beam"),
    ),
    multimodal(
        "Idefics2",
        lambda: hf.Idefics2ForConditionalGeneration(hf.Idefics2Config(
            vision_config=IMAGE,
            perceiver_config={
                "hidden_size": WIDTH, "resampler_n_latents": 4, "resampler_depth": 2,
                "resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2,
            },
            text_config={**TEXT, **IDS, "model_type": "mistral", "num_key_value_heads": 2},
            image_token_id=IMAGE_TOKEN, pad_token_id=2,
        )),
        image_and_text(4, extra=(1,)), (4, 4, 4),
        "vision, resampler (from learned latents) and text of 2 layers each, attention and MLP",
        generate=("greedy", "beam"),
    ),
    multimodal(
        "Idefics3",
        lambda: hf.Idefics3ForConditionalGeneration(hf.Idefics3Config(
            vision_config=IMAGE, text_config=llama_text(), image_token_id=IMAGE_TOKEN,
            scale_factor=2, pad_token_id=2,
        )),
        image_and_text(4, extra=(1,)), (4, 4), BOTH, generate=("greedy", "beam"),
    ),
    multimodal(
        "SmolVLM",
        lambda: hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(
            vision_config=IMAGE, text_config=llama_text(), image_token_id=IMAGE_TOKEN,
            scale_factor=2, pad_token_id=2,
        )),
        image_and_text(4, extra=(1,)), (4, 4), BOTH, generate=("greedy", "beam"),
    ),
    multimodal(
        "BLIP",
        lambda: hf.BlipForConditionalGeneration(hf.BlipConfig(
            vision_config=IMAGE,
            text_config={**TEXT, **IDS, "encoder_hidden_size": WIDTH, "sep_token_id": 1},
        )),
        image_and_text(0), (4, 6),
        "vision 2 x (attention, MLP), text 2 x (self, cross, MLP), post-norm",
    ),
    multimodal(
        "BLIP-2",
        lambda: hf.Blip2ForConditionalGeneration(hf.Blip2Config(
            vision_config=IMAGE,
            qformer_config={
                **TEXT, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 2,
            },
            text_config={
                **TEXT, **IDS, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": WIDTH,
            },
            num_query_tokens=4, image_token_index=IMAGE_TOKEN,
        )),
        image_and_text(4), (4, 5, 4),
        "vision 2 x 2; Q-Former, post-norm on a norm of learned queries: self, cross, MLP and "
        "self, MLP; text 2 x 2",
    ),
    multimodal(
        "GIT",
        lambda: hf.GitForCausalLM(hf.GitConfig(
            vision_config=IMAGE, **TEXT, **IDS, num_image_with_embedding=None,
        )),
        image_and_text(0), (4, 4), BOTH + ", text post-norm", generate=("greedy", "beam"),
    ),
    multimodal(
        "Pix2Struct",
        lambda: hf.Pix2StructForConditionalGeneration(hf.Pix2StructConfig(
            vision_config={
                "hidden_size": WIDTH, "patch_embed_hidden_size": 12, "d_ff": 64, "d_kv": 8,
                "num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 16,
            },
            text_config={
                "vocab_size": VOCABULARY, "hidden_size": WIDTH, "d_ff": 64, "d_kv": 8,
                "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2, **IDS,
            },
        )),
        lambda batch=2, length=8, seed=0: {
            # Row and column of the patch, counted from 1, then its pixels.
            "flattened_patches": torch.cat([
                torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 4))
                .expand(batch, -1, -1),
                normal(batch, 12, 12, seed=seed),
            ], dim=-1),
            "decoder_input_ids": tokens(batch, length, seed),
        },
        (4, 6), SEQ2SEQ, generate=("greedy", "beam"),
    ),
    multimodal(
        "Kosmos-2",
        lambda: hf.Kosmos2ForConditionalGeneration(hf.Kosmos2Config(
            vision_config=IMAGE,
            text_config={
                "vocab_size": VOCABULARY + 3, "max_position_embeddings": 64, "embed_dim": WIDTH,
                "layers": 2, "ffn_dim": 64, "attention_heads": 4, "init_std": SPREAD, **IDS,
            },
            latent_query_num=4,
        )),
        kosmos2, (4, 4), BOTH + "; one cross attention between them has no shortcut",
    ),
    multimodal(
        "ViLT", hugging_face("ViltModel", "ViltConfig", **{**TEXT, **IMAGE}),
        lambda batch=2, length=8, seed=0: {
            **images(16)(batch, length, seed), "input_ids": tokens(batch, length, seed),
        },
        (4,), TWO_LAYERS + ", on patches and words together",
        # The class token's state: ViLT takes its patches in random order.
        lambda out: out.pooler_output,
    ),
    multimodal(
        "LayoutLM", hugging_face("LayoutLMModel", "LayoutLMConfig", **TEXT, **NO_DROPOUT),
        lambda batch=2, length=8, seed=0: {
            "input_ids": tokens(batch, length, seed),
            "bbox": tokens(batch, length, seed)[..., None] + torch.tensor([0, 0, 9, 9]),
        },
        (4,), TWO_LAYERS + ", post-norm", last,
    ),
)  # fmt: skip


def latents(channels=4, size=8, **more):
    """A noisy latent image and its time step; `more` are `(batch, length, seed)` to a tensor."""

    def make(batch=2, length=8, seed=0):
        return {
            "hidden_states": normal(batch, channels, size, size, seed=seed),
            "timestep": tokens(batch, 1, seed)[:, 0],
            **{name: value(batch, length, seed) for name, value in more.items()},
        }

    return make


def words(width=WIDTH, count=None):
    return lambda batch, length, seed: normal(batch, count or length, width, seed=seed + 1000)


def vectors(width):
    return lambda batch, length, seed: normal(batch, width, seed=seed + 2000)


def flux(batch=2, length=8, seed=0):
    return {
        "hidden_states": normal(batch, 12, 8, seed=seed),
        "encoder_hidden_states": words()(batch, length, seed),
        "pooled_projections": vectors(12)(batch, length, seed),
        "timestep": torch.linspace(0.2, 0.9, batch),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(3.0)),
        "txt_ids": torch.zeros(length, 3),
    }


def hunyuan(batch=2, length=8, seed=0):
    """The lengths of both texts are fixed by the config."""
    angles = normal(16, 8, seed=1)
    return {
        "hidden_states": normal(batch, 4, 8, 8, seed=seed),
        "timestep": tokens(batch, 1, seed)[:, 0].float(),
        "encoder_hidden_states": words(24, 5)(batch, length, seed),
        "text_embedding_mask": torch.ones(batch, 5, dtype=torch.long),
        "encoder_hidden_states_t5": words(16, 6)(batch, length, seed),
        "text_embedding_mask_t5": torch.ones(batch, 6, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def diffusion(name, module, inputs, sites, why, **config):
    """A model of diffusers, which is imported when the model is built."""

    def make():
        import diffusers

        torch.manual_seed(0)
        return getattr(diffusers, module)(**config)

    return entry(name, make, inputs, sites, why, first, "diffusion transformers")


HEADS = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}
DIFFUSION = (
    diffusion(
        "DiT", "DiTTransformer2DModel",
        latents(class_labels=lambda batch, length, seed: tokens(batch, 1, seed)[:, 0].remainder(9)),
        (4,), TWO_LAYERS + ", gated by the condition", **HEADS, in_channels=4, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=2,
    ),
    diffusion(
        "PixArt", "PixArtTransformer2DModel",
        latents(
            encoder_hidden_states=words(24),
            added_cond_kwargs=lambda *_: {"resolution": None, "aspect_ratio": None},
        ),
        (6,), "2 layers: self attention, cross attention, MLP", **HEADS, in_channels=4,
        out_channels=4, sample_size=8, caption_channels=24, cross_attention_dim=WIDTH,
        norm_num_groups=2, use_additional_conditions=False, interpolation_scale=1,
    ),
    diffusion(
        "Stable Diffusion 3", "SD3Transformer2DModel",
        latents(encoder_hidden_states=words(24), pooled_projections=vectors(12)), (4, 2),
        "2 joint layers; the text takes no result of the last one", **HEADS, in_channels=4,
        out_channels=4, sample_size=8, joint_attention_dim=24, caption_projection_dim=WIDTH,
        pooled_projection_dim=12, pos_embed_max_size=8,
    ),
    diffusion(
        "Flux", "FluxTransformer2DModel", flux, (4, 4, 2),
        "2 double layers of image and text; 2 single layers, one add each, on both joined",
        **HEADS, in_channels=8, num_single_layers=2, joint_attention_dim=WIDTH,
        pooled_projection_dim=12, axes_dims_rope=(2, 2, 4),
    ),
    diffusion(
        "AuraFlow", "AuraFlowTransformer2DModel",
        latents(encoder_hidden_states=words(24)), (2, 2, 2),
        "2 joint and 2 single layers, each one add of a stream: x + MLP(norm(x + attention(x))) "
        "keeps the attention inside the branch",
        num_attention_heads=4, attention_head_dim=8, num_mmdit_layers=2, num_single_dit_layers=2,
        in_channels=4, out_channels=4, sample_size=8, joint_attention_dim=24,
        caption_projection_dim=WIDTH, pos_embed_max_size=16,
    ),
    diffusion(
        "HunyuanDiT", "HunyuanDiT2DModel", hunyuan, (9, 3),
        "4 layers: self attention, cross attention, MLP; the last starts behind a linear of a "
        "concatenation with the first's state",
        num_attention_heads=4, attention_head_dim=8, num_layers=4, in_channels=4, patch_size=2,
        sample_size=8, hidden_size=WIDTH, mlp_ratio=2.0, cross_attention_dim=24,
        cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=5, text_len_t5=6,
        use_style_cond_and_image_meta_size=False,
    ),
    diffusion(
        "Wan", "WanTransformer3DModel",
        lambda batch=2, length=8, seed=0: {
            "hidden_states": normal(batch, 4, 2, 8, 8, seed=seed),
            "timestep": tokens(batch, 1, seed)[:, 0],
            "encoder_hidden_states": words(24)(batch, length, seed),
        },
        (6,), "2 layers: self attention, cross attention, MLP", **HEADS, in_channels=4,
        out_channels=4, text_dim=24, freq_dim=16, ffn_dim=64, rope_max_seq_len=32,
    ),
) if find_spec("diffusers") else ()  # fmt: skip


def timesfm(batch=2, length=8, seed=0):
    """Whole patches of 4 values."""
    values = normal(batch, 4 * length, seed=seed)
    return {
        "past_values": values,
        "past_values_padding": torch.zeros_like(values, dtype=torch.long),
        "freq": torch.zeros(batch, 1, dtype=torch.long),
    }


def time_series(batch=2, length=8, seed=0):
    """A context of 10 and a lag of 1; the horizon is fixed by the config."""
    return {
        "past_values": normal(batch, 11, seed=seed),
        "past_time_features": normal(batch, 11, 1, seed=seed + 1),
        "past_observed_mask": torch.ones(batch, 11),
        "future_values": normal(batch, 6, seed=seed + 2),
        "future_time_features": normal(batch, 6, 1, seed=seed + 3),
    }


def decisions(batch=2, length=8, seed=0):
    return {
        "states": normal(batch, length, 5, seed=seed),
        "actions": normal(batch, length, 3, seed=seed + 1),
        "returns_to_go": normal(batch, length, 1, seed=seed + 2),
        "timesteps": torch.arange(length).expand(batch, -1),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }


def autoformer_encoder():
    from transformers.models.autoformer.modeling_autoformer import AutoformerEncoder

    return AutoformerEncoder(
        hf.AutoformerConfig(
            prediction_length=6, context_length=10, d_model=WIDTH, encoder_layers=2,
            encoder_attention_heads=4, encoder_ffn_dim=64, moving_average=3, init_std=SPREAD,
            encoder_layerdrop=0.0, lags_sequence=[1],
        )
    )  # fmt: skip


series = partial(entry, family="time series and decisions")

SERIES = (
    series(
        "PatchTST",
        hugging_face(
            "PatchTSTModel", "PatchTSTConfig", num_input_channels=3, context_length=16,
            patch_length=4, patch_stride=4, d_model=WIDTH, num_hidden_layers=2,
            num_attention_heads=4, ffn_dim=64, do_mask_input=False,
        ),
        lambda batch=2, length=8, seed=0: {"past_values": normal(batch, 16, 3, seed=seed)},
        (4,), TWO_LAYERS + ", batch norms, [B, variables, patches, C]", last,
    ),
    series(
        "PatchTSMixer",
        hugging_face(
            "PatchTSMixerModel", "PatchTSMixerConfig", num_input_channels=3, context_length=16,
            patch_length=4, patch_stride=4, d_model=WIDTH, num_layers=2, mode="mix_channel",
        ),
        lambda batch=2, length=8, seed=0: {"past_values": normal(batch, 16, 3, seed=seed)},
        (6,), "2 layers that mix variables, patches and channels", last,
    ),
    series(
        "TimesFM",
        hugging_face(
            "TimesFmModel", "TimesFmConfig", patch_length=4, context_length=64,
            horizon_length=8, hidden_size=WIDTH, intermediate_size=64, head_dim=8,
            num_hidden_layers=2, num_attention_heads=4, initializer_range=SPREAD,
        ),
        timesfm, (4,), TWO_LAYERS, last,
    ),
    series(
        "Time Series Transformer",
        hugging_face(
            "TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", **ENCODER_DECODER,
            prediction_length=6, context_length=10, d_model=WIDTH, lags_sequence=[1],
            num_time_features=1, init_std=SPREAD, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
        ),
        time_series, (4, 6), SEQ2SEQ + ", post-norm", last,
    ),
    series(
        "Autoformer encoder", autoformer_encoder,
        lambda batch=2, length=8, seed=0: {
            "inputs_embeds": normal(batch, length, 3, seed=seed),
        },
        (4,),
        "2 layers: attention, MLP; x - average(x) behind each holds no weight and acts on each "
        "stream by itself",
        last, no_reference="the moving average returns two parts of the stream",
    ),
    series(
        "Decision Transformer",
        hugging_face(
            "DecisionTransformerModel", "DecisionTransformerConfig", state_dim=5, act_dim=3,
            hidden_size=WIDTH, n_layer=2, n_head=4, n_inner=64, max_ep_len=64,
            initializer_range=SPREAD,
        ),
        decisions, (4,), TWO_LAYERS, last,
    ),
)  # fmt: skip

ENTRIES: tuple[Entry, ...] = (*OWN, *VISION, *SPEECH, *MULTIMODAL, *DIFFUSION, *SERIES)
