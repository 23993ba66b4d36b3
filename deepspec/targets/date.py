"""The date that a chat template writes: always the same one, so that a conversation renders alike on every day.

Templates of Llama 3.2, gpt-oss, Mistral and others call ``strftime_now``, which transformers answers with today's date.
A cache that is built over midnight, or appended to a week later, would hold two renderings. Here a macro of that name
is put before such a template and answers with :data:`DATE`, which the identity of everything rendered records.
"""

from __future__ import annotations

import json
from copy import copy
from datetime import date
from typing import Any

DATE = "2024-07-26"  # what Llama 3.1's own template writes without a date

_DAY = date.fromisoformat(DATE)
_CODES = [f"%{code}" for code in "aAwdbBmyYHIpMSfzZjUWcxXGuV"] + [f"%-{code}" for code in "dmHIMSj"]
_VALUES = {"%%": "\x00"} | {code: _DAY.strftime(code) for code in _CODES} | {"\x00": "%"}
_MACRO = (
    "{%- macro strftime_now(format) -%}{%- set ns = namespace(text=format) -%}"
    f"{{%- for code, value in {json.dumps(_VALUES)}.items() -%}}"
    "{%- set ns.text = ns.text | replace(code, value) -%}{%- endfor -%}"
    "{{- ns.text -}}{%- endmacro %}\n"  # transformers' environment takes this newline away (trim_blocks), and no other
)


def template_date(chat_template: Any) -> str | None:
    """The date that a template renders (ISO); None: it renders none."""
    return DATE if "strftime_now" in json.dumps(chat_template) else None


def dated(tokenizer: Any) -> Any:
    """A copy of the tokenizer whose chat template (or templates by name) writes the fixed date."""
    given, fixed = tokenizer.chat_template, copy(tokenizer)
    if isinstance(given, dict):
        fixed.chat_template = {name: _MACRO + undated(template) for name, template in given.items()}
    else:
        fixed.chat_template = _MACRO + undated(given)
    return fixed


def undated(chat_template: Any) -> Any:
    """The template, or the templates by name, as the tokenizer has them."""
    if isinstance(chat_template, dict):
        return {name: undated(template) for name, template in chat_template.items()}
    return chat_template.removeprefix(_MACRO) if isinstance(chat_template, str) else chat_template


def server_keywords(chat_template: Any) -> dict[str, str]:
    """What gives a server's rendering the same date, where the template takes one (Llama's ``date_string``)."""
    takes = template_date(chat_template) is not None and "date_string" in json.dumps(chat_template)
    return {"date_string": _DAY.strftime("%d %b %Y")} if takes else {}
