"""The only module that imports CrypTen: lets 0.4.1 run on current torch, re-exports its API.

CrypTen is installed without its declared dependencies, one of which no longer exists. Where modules
that it imports are missing, stand-ins take their place: `torch.onnx.symbolic_registry` (removed
from torch), OmegaConf (its configuration, a nested dictionary), and onnx (its model importer, which
is never called). Importing this module imports CrypTen, so the rest of `runtime` imports it only
where it is used.
"""

from __future__ import annotations

import importlib.util
import logging
import secrets
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import yaml

from mergec.runtime.core.errors import MergecError, PartyError
from mergec.runtime.core.spec import CLIENT, DEALER

PROVIDERS = {"dealer": "TTP", "insecure-first-party": "TFP"}
"""Sources of CrypTen's correlated randomness, and CrypTen's names for them."""


class _Config(dict[str, Any]):
    """A nested dictionary whose keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


class _OmegaConf:
    """The three functions of OmegaConf that CrypTen's configuration calls."""

    @staticmethod
    def create(data: Mapping[str, Any]) -> _Config:
        return _Config(
            (key, _OmegaConf.create(value) if isinstance(value, Mapping) else value)
            for key, value in data.items()
        )

    @staticmethod
    def from_dotlist(items: Iterable[str]) -> _Config:
        result = _Config()
        for item in items:
            path, _, text = item.partition("=")
            *parents, last = path.split(".")
            place = result
            for parent in parents:
                place = place.setdefault(parent, _Config())
            place[last] = yaml.safe_load(text)
        return result

    @staticmethod
    def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> _Config:
        result = _OmegaConf.create(base)
        for key, value in update.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = _OmegaConf.merge(result[key], value) if both else value
        return result


def _stand_in(name: str, **attributes: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def _prepare() -> None:
    """Provide stand-ins for modules that CrypTen imports and that are not installed.

    Raises MergecError if CrypTen itself is missing.
    """
    if importlib.util.find_spec("crypten") is None:
        raise MergecError("CrypTen is not installed; run `pip install --no-deps crypten==0.4.1`")
    _stand_in("torch.onnx.symbolic_registry", _registry={})
    if importlib.util.find_spec("omegaconf") is None:
        _stand_in("omegaconf", OmegaConf=_OmegaConf)
    if importlib.util.find_spec("onnx") is None:
        _stand_in("onnx", numpy_helper=None)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress CrypTen's deprecation warnings and logs, emitted on every import and start."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


_prepare()
with quiet():
    import crypten
    import crypten.communicator as communicator
    import crypten.mpc.provider.ttp_provider as ttp_provider
    from crypten.communicator import Communicator
    from crypten.config import cfg
    from crypten.cuda import CUDALongTensor
    from crypten.mpc import MPCTensor
    from crypten.mpc.primitives import ArithmeticSharedTensor, BinarySharedTensor
    from crypten.mpc.provider.ttp_provider import TTPClient, TTPServer


class _Messages:
    """The functions of torch.distributed that CrypTen's third party calls, on our communicator."""

    @staticmethod
    def isend(tensor: torch.Tensor, dst: int, group: Any) -> Any:
        return communicator.get().isend(tensor, dst)

    @staticmethod
    def irecv(tensor: torch.Tensor, src: int, group: Any) -> Any:
        return communicator.get().irecv(tensor, src)

    @staticmethod
    def barrier(group: Any) -> None:
        """No message can overtake the seeds, as messages between two roles keep their order."""


_PRODUCTS = {"mul", "matmul", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"}
"""Products of shares that CrypTen computes."""

_DEVICES = {"cpu", "cuda"}

_MOST_ELEMENTS = 1 << 31
"""Most elements of a tensor that may be requested from the third party."""


class _ThirdParty(TTPServer):
    """CrypTen's third party, which validates each request before it executes it."""

    def __init__(self) -> None:
        self.device, self.ttp_group = "cpu", None
        self._setup_generators()
        running = communicator.get()
        while (request := running.recv_obj(CLIENT)) != "terminate":
            try:
                function, self.device, args, kwargs = _read_request(request)
                result = getattr(self, function)(*args, **kwargs)
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                raise PartyError(f"the client requests what cannot be dealt ({error})") from error
            running.send_obj(result.size(), CLIENT)
            running.broadcast(result, DEALER)


def _read_request(request: Any) -> tuple[str, str, tuple[Any, ...], dict[str, Any]]:
    """The function to call, its device and its arguments. Raises ValueError if not allowed."""
    function, device = request["function"], request["device"] or "cpu"
    args, kwargs = request["args"], request["kwargs"]
    if function not in ttp_provider.TTP_FUNCTIONS or torch.device(device).type not in _DEVICES:
        raise ValueError("no such function or device")
    count = 2 if function in ("additive", "binary") else 1
    shapes = [torch.empty(torch.Size(size), device="meta") for size in args[:count]]
    if function == "additive":
        if args[count] not in _PRODUCTS:
            raise ValueError("no such product")
        shapes.append(getattr(torch, args[count])(*shapes, *args[count + 1 :], **kwargs))
    if max(shape.numel() for shape in shapes) > _MOST_ELEMENTS:
        raise ValueError("more elements than a tensor may have")
    return function, device, args, kwargs


cat = crypten.cat
stack = crypten.stack
cryptensor = crypten.cryptensor
no_grad = crypten.no_grad


def is_secret(value: object) -> bool:
    """Whether a value is a CrypTen tensor."""
    return isinstance(value, MPCTensor)


def plain_text(tensor: Any, dst: int | None = None) -> Any:
    """What CrypTen's `get_plain_text` is meant to return: float64, or None if it is not for us.

    CrypTen's decoder returns one less for a negative number that is a few units of its last place
    above a whole number.

    tensor: any shape. dst: the party that learns the value; both if None.
    """
    if not tensor.nelement():
        return torch.empty(tensor.shape, dtype=torch.float64)
    words = tensor.reveal(dst=dst)
    return None if words is None else words.double() / tensor.encoder.scale


def use_provider(name: str) -> None:
    """Choose the source of correlated randomness; call before the parties join."""
    cfg.mpc.provider = PROVIDERS[name]


def install(kind: type) -> None:
    """Make CrypTen use communicators of this class instead of its own over torch.distributed."""
    communicator.DistributedCommunicator = kind
    ttp_provider.dist = _Messages


def start_party() -> None:
    """Agree on seeds with the other party and the dealer; the communicator must be installed."""
    with quiet():
        crypten._setup_prng()
        if cfg.mpc.provider == PROVIDERS["dealer"]:
            TTPClient._init()


def serve_third_party() -> None:
    """At the dealer: deal what the client requests, until it calls `end_third_party`."""
    # CrypTen draws the parties' seeds from torch's generator, which has a fixed seed at start.
    torch.manual_seed(secrets.randbits(63))
    with quiet():
        _ThirdParty()


def end_third_party() -> None:
    """At the client: make the dealer return from `serve_third_party`."""
    running = communicator.get()
    running.send_obj("terminate", DEALER)
    TTPClient.uninit()


__all__ = [
    "PROVIDERS",
    "ArithmeticSharedTensor",
    "BinarySharedTensor",
    "CUDALongTensor",
    "Communicator",
    "MPCTensor",
    "TTPClient",
    "cat",
    "cfg",
    "communicator",
    "cryptensor",
    "end_third_party",
    "install",
    "is_secret",
    "no_grad",
    "plain_text",
    "quiet",
    "serve_third_party",
    "stack",
    "start_party",
    "use_provider",
]
