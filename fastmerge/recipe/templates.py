"""Chat templates by name: the public prompt formats of well-known models, as Jinja.

They are written from the formats that these models' makers document; a template's text decides what
a model sees, so none is taken from elsewhere. Each renders `messages` (role, content), and a
generation prompt where `add_generation_prompt` is true.
"""

from __future__ import annotations

from typing import Any

from fastmerge.errors import RecipeError, brief, nearest

# <|im_start|>role\ncontent<|im_end|>\n
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# A system text, then "### Instruction:" and "### Response:" blocks, two line breaks apart.
_ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% else %}{{ raise_exception('alpaca has the roles system, user and assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

# <|start_header_id|>role<|end_header_id|>\n\ncontent<|eot_id|>, after one <|begin_of_text|>.
_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

# [INST] question [/INST] answer</s>; a system text stands before the first question.
_MISTRAL = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\\n\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('mistral has the roles user and assistant, after one system') }}"
    "{% endif %}{% endfor %}"
)

# [|role|]content[|endofturn|]\n, but for a user's turn, which ends with the line.
_EXAONE = (
    "{% if messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '[|' + message['role'] + '|]' + message['content'] }}"
    "{% if message['role'] != 'user' %}{{ '[|endofturn|]' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)

TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}


def check_jinja(text: str, where: str) -> str | None:
    """Raises RecipeError for a template that transformers could not read: its syntax, filters and
    tests. It is parsed, never run. A note where Jinja is not installed.
    """
    try:
        from jinja2 import Environment, TemplateSyntaxError, nodes
        from jinja2.ext import Extension
    except ImportError:
        return "chat_template: not checked, as jinja2 is not installed"

    class Generation(Extension):
        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    Generation.tags = {"generation"}
    known = Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    try:
        tree = known.parse(text)
    except TemplateSyntaxError as error:
        said = " ".join(str(error.message).split())
        raise RecipeError(
            f"{where}: chat_template is no Jinja that can be read: {said} (its line "
            f"{error.lineno}); mend it"
        ) from None
    except RecursionError:
        raise RecipeError(f"{where}: chat_template is nested too deeply") from None
    for kind, names in ((nodes.Filter, known.filters), (nodes.Test, known.tests)):
        for node in tree.find_all(kind):
            if node.name not in names:
                word = kind.__name__.lower()
                raise RecipeError(
                    f"{where}: chat_template has the {word} {brief(node.name)} (its line "
                    f"{node.lineno}), which Jinja does not; {nearest(node.name, names)}"
                )
    return None
