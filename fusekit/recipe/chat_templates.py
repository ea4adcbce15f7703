"""The `chat_template` setting: chat formats known by name, templates as written, or a vote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fusekit.errors import RecipeError, did_you_mean

_TURN = "{%- for message in messages %}"
_END = "{%- endfor %}"

BUILT_IN = {
    "alpaca": (
        "{{ bos_token }}"
        + _TURN
        + "{%- if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{%- elif message['role'] == 'user' %}"
        "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{%- elif message['role'] == 'assistant' %}"
        "{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{%- endif %}"
        + _END
        + "{%- if add_generation_prompt %}{{ '### Response:\n' }}{%- endif %}"
    ),
    "chatml": (
        _TURN
        + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        + _END
        + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "exaone": (
        _TURN
        + "{%- if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\n' }}"
        "{%- endif %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{%- if message['role'] == 'user' %}{{ '\n' }}"
        "{%- else %}{{ '[|endofturn|]\n' }}{%- endif %}"
        + _END
        + "{%- if add_generation_prompt %}{{ '[|assistant|]' }}{%- endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        + _TURN
        + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
        "+ message['content'] | trim + '<|eot_id|>' }}" + _END + "{%- if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        + _TURN
        + "{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{%- elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token }}"
        "{%- else %}{{ raise_exception('expected user and assistant turns only') }}{%- endif %}"
        + _END
    ),
}
"""Chat formats by the names recipes use."""

_SHORTEST = 20


def check_chat_template(setting: str) -> None:
    """Refuse a setting that is neither `auto`, a known name nor a template.

    Raises:
        RecipeError: it is none of these, or a template that transformers could not load.
    """
    if setting == "auto" or setting in BUILT_IN:
        return
    if len(setting) < _SHORTEST or "{" not in setting:
        raise RecipeError(
            f"chat_template: found {setting!r}, expected 'auto', a built-in template or a Jinja "
            f"template{did_you_mean(setting, ['auto', *BUILT_IN])}"
        )
    _check_syntax(setting)


def _check_syntax(template: str) -> None:
    """Refuse a template that does not compile with the tags that transformers knows."""
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    class Generation(Extension):
        """`{% generation %}`, around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=[loopcontrols, Generation]).compile(template, raw=True)
    except TemplateSyntaxError as error:
        found = f"{error.message}".rstrip(".").replace(". ", "; ")
        raise RecipeError(
            f"chat_template: line {error.lineno} of the template is not valid Jinja: {found}"
        ) from None
    except RecursionError:
        raise RecipeError(
            "chat_template: nested too deeply, expected a template that Jinja can read"
        ) from None


def chosen_template(setting: str, templates: Iterable[str | None]) -> str | None:
    """The template of a checked setting; `auto` is the most frequent of the inputs' templates,
    of equally frequent ones the first. None where no input has any."""
    if setting != "auto":
        return BUILT_IN.get(setting, setting)
    votes = Counter(template for template in templates if template)
    return votes.most_common(1)[0][0] if votes else None
