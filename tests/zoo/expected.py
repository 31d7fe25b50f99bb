"""What attention each model of the zoo computes on the inputs it is given there: data, not code.

Measured by running each model with attention that mixes no tokens, changing one input at a time and watching which
queries and keys change; then read against the models' processors. The grid is 9 x 11 tokens unless a class needs
another; texts have 7 or 13 tokens, reference images 6 x 10.
"""

from __future__ import annotations

from typing import NamedTuple

Range = tuple[int, int]
Grid = tuple[int, int, int]


class Site(NamedTuple):
    """One attention call: its kind, the number of its keys, and what they are.

    ``text`` are the keys that are text, ``None`` where none are, or not one range of them; ``image`` is the first key
    that is an image token of ``grid`` (frames, rows, columns), both ``None`` where operators have nothing to reduce.
    ``certain`` is ``False`` where kind and text are a matter of definition: a conditioning that is neither text nor
    image, a mean of all text that attends to it, text that lies elsewhere in each sample.
    """

    kind: str
    keys: int
    text: Range | None = None
    image: int | None = None
    grid: Grid | None = None
    certain: bool = True

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The grid as the library tells it: (rows, columns) where there is one frame."""
        return self.grid[1:] if self.grid is not None and self.grid[0] == 1 else self.grid


Expected = list[Site]


def video(frames: int, rows: int, columns: int) -> Site:
    """Self-attention over all frames at once."""
    return Site("self", frames * rows * columns, image=0, grid=(frames, rows, columns))


def picture(rows: int, columns: int) -> Site:
    """Self-attention over an image, or over each frame."""
    return video(1, rows, columns)


def sound(tokens: int) -> Site:
    """Self-attention over a sequence."""
    return video(1, 1, tokens)


def words(tokens: int) -> Site:
    """Self-attention of text."""
    return Site("self", tokens, text=(0, tokens))


def cross(tokens: int) -> Site:
    """Cross-attention to text."""
    return Site("cross", tokens, text=(0, tokens))


def pool(tokens: int) -> Site:
    """One query, the mean of all text, and that text: beside it in the sequence, or not."""
    return Site("cross", tokens, certain=False)


def joint(keys: int, text: Range | None, image: int, grid: Grid = (1, 9, 11)) -> Site:
    return Site("joint", keys, text=text, image=image, grid=grid)


def over_frames(frames: int) -> Site:
    return Site("temporal", frames)


_TEXT_FIRST = joint(112, text=(0, 13), image=13)
_TEXT_LAST = joint(112, text=(99, 112), image=0)
_TEXT_REFERENCE = joint(172, text=(0, 13), image=13)
_AUDIO = Site("self", 9)  # a second latent, not the one whose size is known
_TO_AUDIO = Site("cross", 9)


def _unet(fine: Site, coarse: Site, text: int = 7) -> Expected:
    """One layer on the way down, two on the way up, and the middle, at two levels."""
    level = [fine, cross(text)], [coarse, cross(text)]
    return level[0] + level[1] * 4 + level[0] * 2


_SD15 = _unet(picture(18, 22), picture(9, 11))
_GLIGEN = [
    site
    for first, second in zip(_SD15[::2], _SD15[1::2], strict=True)
    for site in (
        first,
        Site("joint", first.keys + 5, (first.keys, first.keys + 5), image=0, grid=first.grid, certain=False),
        second,
    )
]
_LEVEL_3D = [picture(9, 11), cross(7), *[over_frames(3)] * 2]
_DEEP_3D = [picture(5, 6), cross(7), *[over_frames(3)] * 2]
_SVD_LEVEL = [picture(9, 11), Site("cross", 1, certain=False), over_frames(3), Site("cross", 1, certain=False)]
_SVD_DEEP = [picture(5, 6), *_SVD_LEVEL[1:]]
_I2VGEN_KEYS = Site("cross", 75, text=(0, 7))  # then the image's latents, and its embedding
_CONDITION_FRAMES = Site("temporal", 3, certain=False)
_I2VGEN = [picture(18, 22), _I2VGEN_KEYS, *[over_frames(3)] * 2]
_I2VGEN_DEEP = [picture(9, 11), _I2VGEN_KEYS, *[over_frames(3)] * 2]
_K3_FINE, _K3_MIDDLE, _K3_DEEP = picture(20, 24), picture(10, 12), picture(5, 6)
_WAN = [video(3, 9, 11), cross(7)]
_SHORT = [video(2, 9, 11), cross(7)]
_PADDED_TEXT = Site("cross", 16, text=(0, 7))
_WAN_IMAGE = [video(3, 9, 11), Site("cross", 5), cross(512)]
_ANIMATE = [video(3, 9, 11), Site("cross", 517, text=(5, 517))]
_KANDINSKY6 = [*_SHORT, _AUDIO, cross(7), _TO_AUDIO, Site("cross", 198)]
_LTX2 = [video(3, 9, 11), _AUDIO, cross(7), cross(7), _TO_AUDIO, Site("cross", 297)]
_PERCEIVER = Site("cross", 10, certain=False)
_FACE = Site("cross", 3, certain=False)
_GIST = joint(105, text=(0, 6), image=6)._replace(certain=False)
_GIST_LAST = joint(167, text=(159, 167), image=0)._replace(certain=False)
_TILES = Site("self", 768)  # two frames, reordered by tiles of 8 x 8
_COGVIDEOX = joint(310, text=(0, 13), image=13, grid=(3, 9, 11))
_HUNYUAN = [words(13), *[joint(211, text=(198, 211), image=0, grid=(2, 9, 11))] * 2]
_STABLE_AUDIO = Site("joint", 99, image=1, grid=(1, 1, 98), certain=False)  # one key is the duration
_STABLE_AUDIO3 = Site("self", 102, image=3, grid=(1, 1, 99))  # three keys are learned

EXPECTED: dict[str, Expected] = {
    # UNets
    "UNet2DModel": [picture(9, 11)] * 6,
    "UNet2DModel/ncsnpp": [picture(10, 12), picture(5, 6), picture(10, 12)],
    "UNet2DConditionModel/sd15": _SD15,
    "UNet2DConditionModel/linproj": _SD15,
    "UNet2DConditionModel/sdxl": [picture(9, 11), cross(7)] * 8,
    "UNet2DConditionModel/classcond": [
        *(picture(18, 22), cross(7), picture(9, 11), picture(9, 11), cross(7), picture(9, 11), picture(9, 11)),
        *[picture(18, 22), cross(7)] * 2,
    ],
    "UNet2DConditionModel/textmask": _SD15,
    "UNet2DConditionModel/simplecross": [joint(106, text=(0, 7), image=7)] * 4,
    "UNet2DConditionModel/kblocks": [*[cross(7)] * 4, *[picture(9, 11), cross(7)] * 4, *[cross(7)] * 4],
    "UNet2DConditionModel/gligen": _GLIGEN,
    "UNet2DConditionModel/sliced": _SD15,
    "UNet2DConditionModel/vanillaproc": _SD15,
    "UNet2DConditionModel/fused": _SD15,
    "UNet3DConditionModel": [*[over_frames(3)] * 2, *_LEVEL_3D, *_DEEP_3D, *_LEVEL_3D * 2],
    "UNetMotionModel": [
        *_LEVEL_3D,
        *(over_frames(3), over_frames(3)),
        *_DEEP_3D,
        *[over_frames(3)] * 4,
        *_LEVEL_3D * 2,
    ],
    "UNetSpatioTemporalConditionModel": [*_SVD_LEVEL, *_SVD_DEEP, *_SVD_LEVEL * 2],
    "I2VGenXLUNet": [_CONDITION_FRAMES, *[over_frames(3)] * 2, *_I2VGEN, *_I2VGEN_DEEP, *_I2VGEN * 2],
    "TransformerTemporalModel": [over_frames(5)] * 2,
    "Kandinsky3UNet": [
        pool(7),
        *(_K3_MIDDLE, cross(7), cross(7), _K3_DEEP, *[cross(7)] * 4, _K3_DEEP, cross(7), cross(7), _K3_MIDDLE),
        *(cross(7), cross(7), _K3_FINE),
    ],
    "StableCascadeUNet/prior": [joint(114, text=(99, 110), image=0)] * 4,
    "StableCascadeUNet/decoder": [joint(103, text=(99, 103), image=0)] * 3,
    "DreamLiteUNetModel": [cross(7), *[picture(9, 11), cross(7)] * 4],
    "UVit2DModel": [cross(7), cross(7), *[picture(9, 11), cross(7)] * 2, cross(7), cross(7)],
    "UNetControlNetXSModel": [picture(9, 11), cross(7)] * 9,
    "PriorTransformer": [Site("joint", 17, text=(0, 13))] * 2,
    "Transformer2DModel": [picture(9, 11), cross(7)] * 2,
    "Transformer2DModel/vq": [Site("self", 64), cross(7)],  # codes in a row: nothing says where they lie
    "DualTransformer2DModel": [picture(9, 11), cross(77), picture(9, 11), cross(257)],
    "DreamLiteTransformer2DModel": [picture(9, 11), cross(7)],
    # ControlNets
    "ControlNetModel": [picture(18, 22), cross(7), *[picture(9, 11), cross(7)] * 2],
    "ControlNetUnionModel": [Site("self", 2), picture(18, 22), cross(7), picture(9, 11), cross(7)],
    "FluxControlNetModel": [_TEXT_FIRST] * 2,
    "SD3ControlNetModel": [_TEXT_LAST],
    # Images
    "DiTTransformer2DModel": [picture(10, 10)] * 2,
    "PixArtTransformer2DModel": [picture(9, 11), cross(7)] * 2,
    "HunyuanDiT2DModel": [pool(7), *[picture(9, 11), cross(11)] * 4],
    "SD3Transformer2DModel": [_TEXT_LAST] * 3,
    "SD3Transformer2DModel/sd35": [_TEXT_LAST, picture(9, 11), _TEXT_LAST, picture(9, 11), _TEXT_LAST],
    "AuraFlowTransformer2DModel": [joint(120, text=(8, 21), image=21)] * 3,
    "CogView3PlusTransformer2DModel": [_TEXT_FIRST] * 2,
    "CogView4Transformer2DModel": [_TEXT_FIRST] * 2,
    "GlmImageTransformer2DModel": [_TEXT_FIRST] * 2,
    "LuminaNextDiT2DModel": [picture(9, 11), cross(7)] * 2,
    # The image starts behind each sample's own text, so no place is the image's in all of them.
    "Lumina2Transformer2DModel": [words(13), picture(9, 11), *[Site("joint", 112, certain=False)] * 2],
    "SanaTransformer2DModel": [cross(7)] * 2,
    # A perceiver makes a few learned tokens of the text, which stand before the image, or after it and a reference.
    "BriaFibo2Transformer2DModel": [
        *(picture(9, 11), cross(13), Site("self", 6, certain=False)),
        *(_GIST, _GIST, cross(13), _GIST),
    ],
    "BriaFibo2Transformer2DModel/edit": [
        *(_GIST_LAST._replace(keys=159), cross(30), Site("self", 8, certain=False)),
        *(_GIST_LAST, _GIST_LAST, cross(30), _GIST_LAST),
    ],
    "HiDreamImageTransformer2DModel": [joint(153, text=(128, 153), image=0)] * 2,
    "ZImageTransformer2DModel": [
        *(Site("self", 128, image=0, grid=(1, 9, 11)), words(32)),
        *[joint(160, text=(128, 160), image=0)] * 2,
    ],
    "ErnieImageTransformer2DModel": [_TEXT_LAST] * 2,
    "PRXTransformer2DModel": [_TEXT_FIRST] * 2,
    "HunyuanImageTransformer2DModel": [words(13), *[joint(119, text=(99, 119), image=0)] * 2],
    "OmniGenTransformer2DModel": [joint(124, text=None, image=25)] * 2,
    "JoyImageEditTransformer3DModel": [joint(211, text=(198, 211), image=0, grid=(2, 9, 11))] * 2,
    "JoyImageEditPlusTransformer3DModel": [joint(172, text=(159, 172), image=0)] * 2,
    # Packed images
    "FluxTransformer2DModel": [_TEXT_FIRST] * 2,
    "FluxTransformer2DModel/kontext": [_TEXT_REFERENCE] * 2,
    "ChromaTransformer2DModel": [_TEXT_FIRST] * 2,
    "BriaTransformer2DModel": [_TEXT_FIRST] * 2,
    "BriaFiboTransformer2DModel": [_TEXT_FIRST] * 2,
    "LongCatImageTransformer2DModel": [_TEXT_FIRST] * 2,
    "OvisImageTransformer2DModel": [_TEXT_FIRST] * 2,
    "Flux2Transformer2DModel": [_TEXT_FIRST] * 2,
    "Flux2Transformer2DModel/ref": [_TEXT_REFERENCE] * 2,
    "Flux3Transformer2DModel": [words(13), picture(9, 11), Site("self", 60), *[_TEXT_REFERENCE] * 2],
    "QwenImageTransformer2DModel": [_TEXT_FIRST] * 2,
    "QwenImageTransformer2DModel/edit": [_TEXT_REFERENCE] * 2,
    "QwenImage21Transformer2DModel": [words(13), joint(133, text=(0, 13), image=13, grid=(1, 10, 12))] * 2,
    "QwenImage21Transformer2DModel/edit": [
        *(words(4), Site("joint", 64, text=(0, 4), certain=False), Site("joint", 73, certain=False)),
        joint(193, text=None, image=73, grid=(1, 10, 12)),
    ]
    * 2,
    "NucleusMoEImageTransformer2DModel": [_TEXT_LAST] * 2,
    "Ideogram4Transformer2DModel": [_TEXT_FIRST] * 2,
    "Krea2Transformer2DModel": [words(3), words(13), *[_TEXT_FIRST] * 2],
    # Video
    "WanTransformer3DModel": _WAN * 2,
    "WanTransformer3DModel/i2v": _WAN_IMAGE * 2,
    "SkyReelsV2Transformer3DModel": _WAN * 2,
    "SkyReelsV2Transformer3DModel/df": _WAN * 2,
    "ChronoEditTransformer3DModel": _SHORT * 2,
    "WanVACETransformer3DModel": _WAN * 5,
    "WanAnimateTransformer3DModel": [*_ANIMATE, _FACE, *_ANIMATE],
    "WanAnimate2Transformer3DModel": [video(2, 9, 11), _PADDED_TEXT, Site("cross", 5)] * 2,
    "AnyFlowTransformer3DModel": _WAN * 2,
    "AnyFlowFARTransformer3DModel": [Site("self", 512, image=0, grid=(4, 9, 11)), cross(7)] * 2,
    "HeliosTransformer3DModel": [Site("joint", 336, image=138, grid=(2, 9, 11), certain=False), cross(7)] * 2,
    "CogVideoXTransformer3DModel": [_COGVIDEOX] * 2,
    "CogVideoXTransformer3DModel/1.5": [joint(211, text=(0, 13), image=13, grid=(2, 9, 11))] * 2,
    "ConsisIDTransformer3DModel": [*[_PERCEIVER] * 5, *[_COGVIDEOX, _FACE] * 2],
    "EasyAnimateTransformer3DModel": [_COGVIDEOX] * 2,
    "AllegroTransformer3DModel": _WAN * 2,
    "LatteTransformer3DModel": [picture(9, 11), cross(7), over_frames(3)] * 2,
    # Each sample on its own, with the text that is no padding.
    "MochiTransformer3DModel": [
        pool(14),
        *[joint(keys, text=(297, keys), image=0, grid=(3, 9, 11)) for keys in (306, 310)] * 2,
    ],
    "CosmosTransformer3DModel": _SHORT * 2,
    "CosmosTransformer3DModel/v2w": _SHORT * 2,
    "CosmosTransformer3DModel/transfer2.5": [*_SHORT, Site("cross", 5, certain=False)] * 2,
    "Cosmos3OmniTransformer": [words(7), joint(205, text=(0, 7), image=7, grid=(2, 9, 11))] * 2,
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanVideoTransformer3DModel/tokenreplace": _HUNYUAN,
    # Earlier frames at three sizes, the video, an image's embedding, the text.
    "HunyuanVideoFramepackTransformer3DModel": [
        words(13),
        *[joint(453, text=(440, 453), image=237, grid=(2, 9, 11))] * 2,
    ],
    "HunyuanVideo15Transformer3DModel": [
        words(9),
        *[joint(214, text=(201, 214), image=0, grid=(2, 9, 11))._replace(certain=False)] * 2,
    ],
    "Kandinsky5Transformer3DModel": [words(7), *_SHORT * 2],
    "Kandinsky5Transformer3DModel/nabla": [words(7), _TILES, cross(7)],
    "Kandinsky6Transformer3DModel": [words(7), words(7), *_KANDINSKY6 * 2],
    "Kandinsky6SRTransformer3DModel": [_TILES] * 2,
    # At the end the video attends to itself and to what the blocks before have made of it.
    "MotifVideoTransformer3DModel": [
        *[joint(211, text=(198, 211), image=0, grid=(2, 9, 11)), cross(13)] * 2,
        Site("self", 396, image=0, grid=(2, 9, 11), certain=False),  # and a copy of it
    ],
    "LTXVideoTransformer3DModel": _WAN * 2,
    "LTX2VideoTransformer3DModel": _LTX2 * 2,
    "SanaWMLTX2RefinerTransformer3DModel": [Site("self", 198), cross(7)] * 2,  # packed, and nothing says how
    "SanaVideoTransformer3DModel": [cross(7)] * 2,
    "SanaWMTransformer3DModel": [cross(7), video(3, 9, 11), video(3, 9, 11), cross(7)],
    "MiniMaxH3Transformer3DModel": [words(13), *[joint(217, text=(0, 13), image=19, grid=(2, 9, 11))] * 2],
    # Sound and other sequences
    "UNet1DModel": [*[sound(120)] * 3, *[sound(60)] * 6, *[sound(120)] * 3],
    "T5FilmDecoder": [sound(96), Site("cross", 22, certain=False)] * 2,
    "MiniMaxMusic3RVQDepthDecoder": [sound(16)] * 2,
    "AceStepTransformer1DModel": [sound(99), cross(11)] * 2,
    "StableAudioDiTModel": [_STABLE_AUDIO, cross(7)] * 2,
    "StableAudio3DiTModel": [_STABLE_AUDIO3, cross(7)] * 2,
    "StableAudio3DiTModel/diff": [_STABLE_AUDIO3, _STABLE_AUDIO3, cross(7), cross(7)] * 2,
    "LongCatAudioDiTTransformer": [sound(99), cross(7)] * 2,
    "MiniMaxMusic3Transformer1DModel": [Site("self", 100, image=1, grid=(1, 1, 99))] * 2,
    "RFD4ProteinaTransformer": [Site("self", 40)] * 2,  # of a protein
}
