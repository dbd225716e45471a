"""Chat templates, as stored in checkpoints: jinja2 text, rendered in its sandbox."""

import json
from datetime import datetime

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def _raise(message):
    raise TemplateError(message)


def render(template: str, messages: list[dict], add_generation_prompt: bool, **tokens) -> str:
    """The text of a conversation; `tokens` are bos_token, eos_token, ... as the template may use them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals.update(raise_exception=_raise, strftime_now=lambda f: datetime.now().strftime(f))
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **tokens
        )
    except Exception as error:  # a template is foreign code and may raise anything
        raise ValueError(f"the chat template cannot render these messages: {error}") from None
