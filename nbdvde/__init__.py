"""A network block device server whose disks are compressed, encrypted and authenticated."""

TYPE_CHECKING = False  # as that of `typing`, whose import is time in which Ctrl-C shows a traceback
if TYPE_CHECKING:
    from nbdvde.engine.access import (
        check_image,
        create_image,
        open_image,
        read_info,
        read_key_area,
        update_keys,
    )
    from nbdvde.engine.keys import KeyFile, MasterKey, Passphrase
    from nbdvde.engine.managed.anon import AnonTable
    from nbdvde.engine.managed.metricslog import MetricsLog
    from nbdvde.engine.managed.stream import Stream
    from nbdvde.engine.managed.vault import Vault
    from nbdvde.engine.managed.worm import Worm
    from nbdvde.engine.regions.samples import Sample
    from nbdvde.engine.regions.stream import StreamPolicy
    from nbdvde.engine.repair import repair_image, salvage_image

_HOMES = {
    "nbdvde.engine.access": (
        "check_image", "create_image", "open_image", "read_info", "read_key_area", "update_keys",
    ),
    "nbdvde.engine.keys": ("KeyFile", "MasterKey", "Passphrase"),
    "nbdvde.engine.managed.anon": ("AnonTable",),
    "nbdvde.engine.managed.metricslog": ("MetricsLog",),
    "nbdvde.engine.managed.stream": ("Stream",),
    "nbdvde.engine.managed.vault": ("Vault",),
    "nbdvde.engine.managed.worm": ("Worm",),
    "nbdvde.engine.regions.samples": ("Sample",),
    "nbdvde.engine.regions.stream": ("StreamPolicy",),
    "nbdvde.engine.repair": ("repair_image", "salvage_image"),
}  # fmt: skip
__all__ = [
    "AnonTable", "KeyFile", "MasterKey", "MetricsLog", "Passphrase", "Sample", "Stream", "StreamPolicy", "Vault",
    "Worm", "check_image", "create_image", "open_image", "read_info", "read_key_area", "repair_image", "salvage_image",
    "update_keys",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import on first use: `nbdvde --version` needs none of the engine."""
    import importlib  # noqa: PLC0415 - as above

    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
