"""Backbones by name.

IResNets, MobileFaceNets and vision transformers have the names, shapes and parameter names of arcface_torch, so a
``model.pt`` of one loads in the other with ``strict=True``. MixFaceNets and VarGFaceNet are here only, and arcface_torch gets
them from here. ``small`` and ``tiny`` are for CPUs: demo, tests and benchmarks.
Other packages offer backbones in the entry point group ``arcface_torch.backbones``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from f2c_plugin.errors import BrokenPlugin, ConfigError
from f2c_plugin.models.iresnet import IResNet
from f2c_plugin.models.mixfacenet import MEDIUM, SMALL, MixFaceNet
from f2c_plugin.models.mobilefacenet import MobileFaceNet
from f2c_plugin.models.plain import PlainNet
from f2c_plugin.models.vargfacenet import VarGFaceNet
from f2c_plugin.models.vit import VisionTransformer
from f2c_plugin.utils.inputs import embeddings_in
from f2c_plugin.utils.registry import BACKBONES, broken, installed, load_plugin

Factory = Callable[[int, bool], nn.Module]  # takes num_features and fp16


def _iresnet(*blocks: int, segments: tuple[int, int] | None = None) -> Factory:
    return lambda num_features, fp16: IResNet(blocks, num_features, fp16=fp16, segments=segments)


def _plain(*layers: tuple[int, int], before: Callable[[], nn.Module] = nn.Identity) -> Factory:
    return lambda num_features, fp16: PlainNet(layers, before, num_features, fp16)


def _vit(dim: int, depth: int, drop_path: float, mask_ratio: float) -> Factory:
    return partial(VisionTransformer, dim, depth, drop_path, mask_ratio, checkpointing=depth > 12)


NETWORKS: dict[str, Factory] = {
    "r18": _iresnet(2, 2, 2, 2), "r34": _iresnet(3, 4, 6, 3), "r50": _iresnet(3, 4, 14, 3),
    "r100": _iresnet(3, 13, 30, 3), "r200": _iresnet(6, 26, 60, 6), "r2060": _iresnet(3, 128, 896, 3, segments=(20, 100)),
    "mixfacenet_s": partial(MixFaceNet, 16, SMALL), "mixfacenet_m": partial(MixFaceNet, 24, MEDIUM), "vargfacenet": VarGFaceNet,
    "mbf": partial(MobileFaceNet, (1, 4, 6, 2), 2), "mbf_large": partial(MobileFaceNet, (2, 8, 12, 4), 4),
    "vit_t": _vit(256, 12, 0.1, 0.1), "vit_t_dp005_mask0": _vit(256, 12, 0.05, 0.0),
    "vit_s": _vit(512, 12, 0.1, 0.1), "vit_s_dp005_mask_0": _vit(512, 12, 0.05, 0.0), "vit_b": _vit(512, 24, 0.1, 0.1),
    # A tenth is masked here, too, as in arcface_torch, whose forward pass looks only at whether mask_ratio is above 0.
    "vit_b_dp005_mask_005": _vit(512, 24, 0.05, 0.1), "vit_l_dp005_mask_005": _vit(768, 24, 0.05, 0.1),
    "vit_h": _vit(1024, 48, 0.1, 0.0),
    "small": _plain((16, 2), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)),
    "tiny": _plain((16, 2), (32, 2), (64, 2), (128, 1), before=partial(nn.AvgPool2d, 2)),
}


TOO_LARGE = ("r2060", "vit_h")  # for an ONNX file, so that they are not trained here


def networks() -> list[str]:
    """The names of all backbones, with those of other packages."""
    return [*NETWORKS, *(name for name in installed(BACKBONES) if name not in NETWORKS)]


def get_model(name: str, num_features: int = 512, fp16: bool = False) -> nn.Module:
    """A new net, from images (B, 3, 112, 112) in [-1, 1] to embeddings, float32 (B, num_features).

    With fp16, all but the last layers run under autocast. The factory of another package is called as arcface_torch calls
    its own: ``factory(dropout=0.0, fp16=…, num_features=…)``. Its net may return a tuple that begins with the embeddings.

    Raises:
        ConfigError: there is no such name; names those that can be trained.
        BrokenPlugin: another package's factory gives no net.
    """
    if name in NETWORKS:
        return NETWORKS[name](num_features, fp16)
    if name not in networks():
        known = ", ".join(each for each in networks() if each not in TOO_LARGE)
        raise ConfigError(f"network={name!r}: must be one of {known}")
    factory = load_plugin(BACKBONES, name)
    try:
        net = factory(dropout=0.0, fp16=fp16, num_features=num_features)
    except Exception as error:  # whatever that package raises
        raise broken(BACKBONES, name, error) from error
    if not isinstance(net, nn.Module):
        raise broken(BACKBONES, name, f"it returns a {type(net).__name__}, but must return a torch.nn.Module")
    net.register_forward_hook(_only_embeddings)
    return net


def _only_embeddings(_: nn.Module, __: Any, output: Any) -> Tensor:
    """What is in a net's output for all that calls it: training, verification, the export."""
    return embeddings_in(output)


class _Undrawn(TorchFunctionMode):
    """Leaves tensors as they are where a net would draw their first values."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.normal_ or getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def import_package_of(name: str) -> None:
    """Import another package's net before a mode or device is set that would change the tensors that its modules make."""
    if name not in NETWORKS and name in networks():
        load_plugin(BACKBONES, name)


def get_model_on_meta(name: str, num_features: int = 512, fp16: bool = False) -> nn.Module:
    """A net on the meta device: its tensors have shapes, but no values. Raises as ``get_model``."""
    import_package_of(name)
    try:
        # Normal values on the meta device would import PyTorch's compiler, which takes seconds.
        with torch.device("meta"), _Undrawn():
            return get_model(name, num_features, fp16)
    except BrokenPlugin:
        # Constructors of other packages may read values, which tensors on the meta device have not, as timm's do:
        # [x.item() for x in torch.linspace(0, 0.1, depth)].
        with torch.random.fork_rng(devices=[]):
            return get_model(name, num_features, fp16).to("meta")
