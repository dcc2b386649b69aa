"""T2I-Adapter (arXiv 2302.08453): what a condition encoder makes of a picture is added to features of the UNet.

adapter = T2IAdapter(model, "depth", weights="t2iadapter_depth_sd15v2.pth").inject()
adapter.set_condition_features(adapter.compute_condition_features(depth_map))
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from PIL import Image
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.adapters.adapter import Adapter
from refiners.adapters.delta import Scale, checked_scale, repeated
from refiners.adapters.scaling import Scaling
from refiners.fluxion.checks import list_of_pictures
from refiners.fluxion.context import Contexts
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.utils import images_to_tensor
from refiners.foundationals.latent_diffusion.control.t2i_adapter_encoder import (
    SD1_T2I,
    SDXL_T2I,
    ConditionEncoder,
    FeaturePlace,
    feature_places,
)
from refiners.foundationals.latent_diffusion.control.t2i_adapter_names import load_condition_encoder
from refiners.foundationals.latent_diffusion.model import resized
from refiners.foundationals.latent_diffusion.participant import Participant
from refiners.foundationals.latent_diffusion.unet import DownBlocks, HasUNet, UNet, unet_of
from refiners.foundationals.latent_diffusion.unet_call import check_one_for_each

CONTEXT = "t2i_adapter"


class AddedFeatures(fl.Residual):
    """Adds the features of a T2I-Adapter for one level."""

    def __init__(self, name: str, level: int, scale: Scale) -> None:
        self.name = name
        super().__init__(
            LevelFeatures(_key(name, level)),
            Scaling(scale),
        )


class LevelFeatures(fl.ContextModule):
    """The features in the context of T2I-Adapters under a key, for each row of x."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.use_context(CONTEXT)[self.key]
        if features.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"the features of a T2I-Adapter are {tuple(features.shape[2:])} where the UNet's are "
                f"{tuple(x.shape[2:])}: compute them for a picture of the size that is made"
            )
        check_one_for_each("features of a T2I-Adapter", features.shape[0], x.shape[0], self.use_context("diffusion"))
        return repeated(features, x.shape[0])

    def extra_repr(self) -> str:
        return repr(self.key)


class T2IAdapter(fl.Chain, Participant, Adapter[DownBlocks]):
    """Leads a UNet by what a condition encoder makes of a picture. Several add up.

    target: a UNet, or a model with one.
    name: what tells it from other T2I-Adapters on the same UNet.
    condition_encoder: None loads it from `weights`, a file in any format, on the UNet's device and in its dtype. It is
        no part of the UNet's tree; without either, features have to come from elsewhere.
    scale: how strong it is: a number, or one for each picture of a batch.
    end: the share of the steps after which it is off; 1 keeps it on to the end.
    Raises ValueError if the condition encoder is for other UNets.
    """

    def __init__(
        self,
        target: UNet | HasUNet,
        name: str = "t2i_adapter",
        condition_encoder: ConditionEncoder | None = None,
        weights: Path | str | Mapping[str, Tensor] | None = None,
        scale: Scale = 1.0,
        end: float = 1.0,
    ) -> None:
        if not 0 <= end <= 1:
            raise ValueError(f"end is {end}, but should be a share of the steps, from 0 to 1")
        unet = unet_of(target)
        if condition_encoder is None and weights is not None:
            condition_encoder = load_condition_encoder(weights, None, unet.spec, unet.device, unet.dtype)
        self.name = name
        self.end = end
        self.places = feature_places(unet.spec)
        self._condition_encoder = [condition_encoder]  # in a list: no child, so that the UNet's names stay
        if condition_encoder is not None:
            _check_fits(condition_encoder, self.places, name)
        self._scale = checked_scale(scale)
        down_blocks = unet.ensure_find(DownBlocks)
        with self.setup_adapter(down_blocks):
            super().__init__(down_blocks)
        for level in range(len(self.places)):
            self.register_buffer(_buffer(level), None, persistent=False)

    @property
    def condition_encoder(self) -> ConditionEncoder:
        """What makes features of pictures. Raises ValueError if there is none."""
        encoder = self._condition_encoder[0]
        if encoder is None:
            raise ValueError(f"T2I-Adapter {self.name!r} has no condition encoder: give it one, or weights to load")
        return encoder

    # -- the condition

    def compute_condition_features(
        self, image: Image.Image | Sequence[Image.Image] | Tensor, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, ...]:
        """Features (B, C, h, w) of each level.

        image: a picture of any mode, or several, which are turned into RGB, or into grey if that is what the encoder
            sees, without their transparency; or (B, in_channels, H, W) in [0, 1].
        size: height and width to resize pictures to; None leaves them as they are.
        Raises ValueError for other shapes or values, or sides that are no multiples of the encoder's squares,
        TypeError for what is no picture.
        """
        encoder = self.condition_encoder
        channels, side = encoder.spec.in_channels, encoder.spec.unshuffle_factor
        if not isinstance(image, Tensor):
            images = list_of_pictures(image)
            sized = [resized(each, size or (each.height, each.width)) for each in images]
            image = images_to_tensor([each.convert("RGB" if channels == 3 else "L") for each in sized])
        if image.ndim != 4 or image.shape[1] != channels or image.shape[2] % side or image.shape[3] % side:
            raise ValueError(
                f"T2I-Adapter {self.name!r} takes pictures of {channels} channels with sides that are multiples of "
                f"{side}, not {tuple(image.shape)}: resize or convert it"
            )
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError(
                f"T2I-Adapter {self.name!r} takes values from 0 to 1, but these go from {image.min():.3g} to "
                f"{image.max():.3g}: is the picture scaled to -1 … 1, or to 255?"
            )
        return encoder(image.to(device=encoder.device, dtype=encoder.dtype))

    def set_condition_features(self, features: Sequence[Tensor]) -> None:
        """Lead all calls from now on by these features, one (B, C, h, w) for each level.

        B is 1, or the number of pictures. Raises ValueError if there are more or fewer than the UNet has places for, or
        of other widths.
        """
        widths = [place.width for place in self.places]
        if [feature.shape[1] for feature in features if feature.ndim == 4] != widths or len(features) != len(widths):
            shapes = ", ".join(str(tuple(feature.shape)) for feature in features)
            raise ValueError(
                f"the features of T2I-Adapter {self.name!r} are {shapes or 'none'}, but the UNet needs (B, C, h, w) "
                f"with C of {widths}: is the adapter for another model?"
            )
        for level, feature in enumerate(features):
            self._buffers[_buffer(level)] = feature.to(self.device, self.dtype)

    @property
    def spatial_conditions(self) -> dict[str, Tensor]:
        """The features, by "context.key": what covers the picture, and is cropped along where the UNet sees a part.

        Raises ValueError if none were set.
        """
        conditions: dict[str, Tensor] = {}
        for level in range(len(self.places)):
            feature = self._buffers[_buffer(level)]
            if feature is None:
                raise ValueError(f"T2I-Adapter {self.name!r} was given no features: call set_condition_features first")
            conditions[f"{CONTEXT}.{_key(self.name, level)}"] = feature
        return conditions

    def init_context(self) -> Contexts:
        return {CONTEXT: {name.removeprefix(f"{CONTEXT}."): x for name, x in self.spatial_conditions.items()}}

    # -- the scale

    @property
    def scale(self) -> Scale:
        """How strong it is: a number, or one for each picture of a batch. What was compiled stays good."""
        return self._scale

    @scale.setter
    def scale(self, value: Scale) -> None:
        self._scale = checked_scale(value)
        self._set_scales(is_on=True)

    def before_step(self, index: int, count: int) -> None:
        """Switch off after the last step that is led."""
        self._set_scales(is_on=index < int(count * self.end))

    def _set_scales(self, is_on: bool) -> None:
        scale = self._scale if is_on else 0.0
        for added in self._added_to(cast(Chain, self.root)):
            scaling = added.layer("Scaling", Scaling)
            if scaling.scale != scale:
                scaling.scale = scale

    # -- the tree

    def inject(self, parent: Chain | None = None) -> Self:
        """Add the features at their places, see `feature_places`. Raises ValueError if the name is taken."""
        root = self.target.root
        if not isinstance(root, UNet):
            raise ValueError(f"T2I-Adapter {self.name!r} belongs in a UNet, but its target sits in {root.get_path()}")
        if self._added_to(root):
            raise ValueError(f"there is a T2I-Adapter {self.name!r} on this UNet: give this one another name")
        for level, place in enumerate(self.places):
            step = _step(root, place)
            index = next((i for i, child in enumerate(step) if isinstance(child, fl.SetContext)), len(step))
            step.insert(index, AddedFeatures(self.name, level, self._scale))
        return super().inject(parent)

    def eject(self) -> None:
        """Take it off the UNet; features and scale are kept."""
        added = self._added_to(cast(Chain, self.root))
        super().eject()
        for features in added:
            features.ensure_parent.remove(features)

    def _added_to(self, root: Chain) -> list[AddedFeatures]:
        return [added for added in root.layers(AddedFeatures) if added.name == self.name]


def _step(root: UNet, place: FeaturePlace) -> Chain:
    step: Any = root
    for slot in place.slots:
        step = step[slot]
        step = step.base if isinstance(step, Adapter) else step
    return step


def _check_fits(encoder: ConditionEncoder, places: Sequence[FeaturePlace], name: str) -> None:
    spec = encoder.spec
    widths, scales = tuple(place.width for place in places), [place.scale for place in places]
    if spec.channels != widths or len({side / scale for side, scale in zip(spec.patch_sides, scales, strict=True)}) > 1:
        families = {SD1_T2I.patch_sides: "Stable Diffusion 1", SDXL_T2I.patch_sides: "Stable Diffusion XL"}
        raise ValueError(
            f"T2I-Adapter {name!r} makes features of widths {spec.channels} for squares of {spec.patch_sides} pixels, "
            f"but this UNet has widths {widths} at {scales} latents each: it is for "
            f"{families.get(spec.patch_sides, 'another model')}"
        )


def _key(name: str, level: int) -> str:
    return f"{name}.{level}"


def _buffer(level: int) -> str:
    return f"features_{level}"
