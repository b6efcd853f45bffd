"""Puts torchord's pages, its tab and its defaults into the Flower of this process."""

from __future__ import annotations

import os
from typing import Any

from flower import urls
from tornado.options import options

from torchord.cache.settings import api_recipes, api_tokens
from torchord.coordinator.commands.common import find_modules_here
from torchord.coordinator.pages.tokens import Tokens
from torchord.tasks.flower_pages.api import Api
from torchord.tasks.flower_pages.asking import Asking
from torchord.tasks.flower_pages.handlers import handlers
from torchord.tasks.flower_pages.loader import Loader
from torchord.tasks.flower_pages.metrics import MetricsHandler
from torchord.tasks.flower_pages.words import OPTIONS, format_task


def register(allows: frozenset[str], *, whole: bool) -> None:
    """Add the pages. To be called before Flower makes its web server; a second call changes nothing.

    Args:
        allows: what the pages may do, of `torchord.cache.settings.FLOWER_ALLOWS`.
        whole: whether Flower's options get torchord's defaults; else tasks are put in words, no more.

    Raises:
        InvalidInput: the tokens of the REST interface cannot be read.
    """
    if isinstance(urls.settings.get("template_loader"), Loader):
        return
    api = Api(Asking(), Asking(), Tokens(api_tokens()), api_recipes())
    defaults: dict[str, Any] = OPTIONS if whole else {"format_task": format_task}
    for name, value in defaults.items():
        setattr(options, name, value)
    theirs = os.fspath(urls.settings["template_path"])
    urls.settings["template_loader"] = Loader(theirs)
    if api.recipes:
        find_modules_here()
    ours = [*handlers(api.asking, allows), *api.addresses()]
    urls.handlers[:0] = [("/metrics", MetricsHandler), *ours]
