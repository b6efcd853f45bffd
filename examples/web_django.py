"""A Django site in one file that trains a model and answers from it while it trains (`pip install django`).

    celery -A torchord worker                                         workers, in this directory
    python -m examples.web_django runserver                           the site
    curl -X POST localhost:8000/train/digits-01
    curl localhost:8000/train/digits-01
    curl localhost:8000/train/digits-01/answers -d '{"images": [[[[0, ...]]]]}'

In a checkout the workers need TORCHORD_ALLOWED_MODULES=examples,torch. A project of your own has settings,
a Celery app and models that a dataset reads: docs/your-project.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import django
import torch
from django.conf import settings
from django.core.management import execute_from_command_line
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_http_methods

from examples import digits
from torchord import Master, TrainingConfig
from torchord.cache.errors import CacheError, NoWorker, RunNotFound, TorchordError, VersionMissing

ANSWER_SECONDS = 30
MODULE = "examples.web_django"

if not settings.configured:
    settings.configure(
        ROOT_URLCONF=MODULE, ALLOWED_HOSTS=["localhost", "127.0.0.1", "testserver"], USE_TZ=True
    )
    django.setup()


@cache
def master() -> Master:
    """One for the program, made at the first request; all threads may use it."""
    return Master()


def view(*methods: str) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., HttpResponse]]:
    """A view that answers JSON, and an error of torchord's with whose fault it is (docs/your-project.md).

    It is called by programs and not from pages, so it has no CSRF token; a site with a login keeps Django's.
    """

    def made(answer: Callable[..., dict[str, Any]]) -> Callable[..., HttpResponse]:
        @csrf_exempt
        @require_http_methods([*methods])
        @wraps(answer)
        def answered(request: HttpRequest, name: str) -> HttpResponse:
            try:
                return JsonResponse(answer(request, name))
            except (RunNotFound, VersionMissing) as error:
                return JsonResponse({"error": str(error)}, status=404)
            except (CacheError, NoWorker) as error:
                return JsonResponse({"error": str(error)}, status=503)
            except (TorchordError, ValueError, KeyError, TypeError) as error:
                return JsonResponse({"error": str(error)}, status=422)

        return answered

    return made


@view("GET", "POST")
def train(request: HttpRequest, name: str) -> dict[str, Any]:
    """POST queues a run and returns at once; GET says how far it is."""
    if request.method == "POST":
        epochs = int(request.GET.get("epochs", 20))
        config = TrainingConfig(epochs=epochs, batch_size=digits.BATCH, shards=4)
        master().submit(digits.recipe(epochs), config, name=name)
    status = master().run(name).status()
    return {"state": status.state, "version": status.version, "total": status.total_steps}


@view("POST")
def answers(request: HttpRequest, name: str) -> dict[str, Any]:
    """Which digits the images show, by the newest version, whether or not the run goes on."""
    images = torch.tensor(json.loads(request.body)["images"], dtype=torch.float32)
    version, outputs = master().run(name).predict_newest(images, timeout=ANSWER_SECONDS)
    return {"version": version, "digits": outputs.argmax(1).tolist()}


@view("POST")
def cancel(request: HttpRequest, name: str) -> dict[str, Any]:
    """End a run for good; its versions go on answering for a week."""
    master().run(name).cancel()
    return {"state": master().run(name).status().state}


urlpatterns = [
    path("train/<str:name>", train),
    path("train/<str:name>/answers", answers),
    path("train/<str:name>/cancel", cancel),
]
application = get_wsgi_application()

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
