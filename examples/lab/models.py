"""The networks of the lab, untrained: stock classes of diffusers and transformers, small enough for two CPU cores."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from scenes import BACKGROUNDS, COLOURS, FILLS, LABELS, PLACES, RADII, SHAPES, SIZE, TEXTURES
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
)

TOKENS = 24  # of the longest caption, with its start and end
TEXT_WIDTH = 128
LATENT_SIZE = SIZE // 4
LATENT_CHANNELS = 8

WORDS = (
    *("a", "an", "and", "background", *RADII, *FILLS, *COLOURS, *SHAPES, *BACKGROUNDS, *TEXTURES),
    *(word for place in PLACES for word in place.split()),
)
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer() -> CLIPTokenizer:
    """Every word of the grammar is one token; others are spelled."""
    learned = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    learned.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[START, END],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    singles = [f"{letter} {letter}" for letter in letters]  # a letter within a word, and as its end
    learned.train_from_iterator([" ".join(sorted(set(WORDS))), *singles], trainer)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = learned.model.save(folder)
        known = json.loads(Path(vocabulary).read_text(encoding="utf-8"))
        pairs = [tuple(line.split()) for line in Path(merges).read_text(encoding="utf-8").splitlines()[1:]]
        return CLIPTokenizer(vocab=known, merges=pairs, model_max_length=TOKENS, unk_token=END, pad_token=END)


def text_encoder(vocabulary: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=vocabulary.eos_token_id,
            pad_token_id=vocabulary.pad_token_id,
        )
    )


def silent_encoder() -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """A T5 for StableDiffusion3Pipeline, which asks for one, that gives zeros, as that pipeline does without it: the
    words are all told by the other encoder. Its tokenizer drops every word, so that no length is too short."""
    deaf = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    deaf.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    deaf.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(vocab_size=2, d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1, use_cache=False)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return PreTrainedTokenizerFast(tokenizer_object=deaf, pad_token="<pad>", eos_token="</s>"), encoder


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        shift_factor=0.0,
    )


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=(2, 3, 4),  # diffusers means the number of heads, of 32 channels each
        cross_attention_dim=TEXT_WIDTH,
    )


def dit() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        num_attention_heads=5,
        attention_head_dim=32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=2 * LATENT_SIZE,
        qk_norm="rms_norm",
    )


def judge() -> ViTForImageClassification:
    """Its labels are phrases, a thing at a place each, and any number of them may hold."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            patch_size=8,
            hidden_size=160,
            intermediate_size=320,
            num_hidden_layers=5,
            num_attention_heads=5,
            problem_type="multi_label_classification",
            id2label=dict(enumerate(LABELS)),
            label2id={label: index for index, label in enumerate(LABELS)},
        )
    )
