"""A note of the design in a Hugging Face model's config, which its `save_pretrained` writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from mhc_compile.config import MHCConfig
from mhc_compile.runtime.checkpoint import CONFIG_KEY


def note_in_config(model: nn.Module, config: MHCConfig, sites: list[str]) -> None:
    """Adds the design and the sites to `model.config`; models without such a config have none."""
    found = _config_of(model)
    if found is not None:
        setattr(found, CONFIG_KEY, {"config": config.to_dict(), "sites": sites})


def forget_in_config(model: nn.Module) -> None:
    """Undoes `note_in_config`."""
    found = _config_of(model)
    if found is not None and hasattr(found, CONFIG_KEY):
        delattr(found, CONFIG_KEY)


@contextlib.contextmanager
def note_kept_on_error(model: nn.Module) -> Iterator[None]:
    """Puts a note back that the config had already, as that of a plain model from a directory."""
    found = _config_of(model)
    before = getattr(found, CONFIG_KEY, None)
    try:
        yield
    except BaseException:
        if before is not None:
            setattr(found, CONFIG_KEY, before)
        raise


def _config_of(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    saves = hasattr(model, "save_pretrained") and hasattr(config, "save_pretrained")
    return config if saves and hasattr(config, "to_json_file") else None
