"""Chat templates: what they may use, and that they cannot reach out of their sandbox."""

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.data.chat import render

TURNS = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Hello"}]
CHATML = """{% for m in messages %}
<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}
  {% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}"""


def test_a_conversation_is_rendered_turn_by_turn():
    assert render(CHATML, TURNS, False, eos_token="</s>") == "<|user|>Hi é</s>\n<|assistant|>Hello</s>\n"


turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()})


@given(st.lists(turns))
def test_the_generation_prompt_only_appends(messages):
    assert render(CHATML, messages, True) == render(CHATML, messages, False) + "<|assistant|>"


@given(st.text())
def test_a_message_is_text_and_never_a_template(content):
    text = "{{ bos_token }}{% raise %}{#" + content
    assert render("{{ messages[0]['content'] }}", [{"role": "user", "content": text}], False) == text


def test_special_tokens_are_there_by_name_and_empty_where_unknown():
    assert render("{{ bos_token }}|{{ eos_token }}", [], False, bos_token="<s>") == "<s>|"


def test_tojson_keeps_other_scripts_and_markup_as_they_are():
    assert render("{{ messages[0] | tojson }}", TURNS, False) == '{"role": "user", "content": "Hi é"}'
    assert render("{{ ['<a>'] | tojson(indent=1) }}", [], False) == '[\n "<a>"\n]'


def test_a_loop_may_break_and_continue():
    template = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}"
        "{{ i }}{% endfor %}"
    )
    assert render(template, [], False) == "023"


def test_the_date_is_there_for_templates_that_tell_it():
    before = datetime.now().year
    assert before <= int(render("{{ strftime_now('%Y') }}", [], False)) <= datetime.now().year


ATTACKS = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "classes by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "classes by format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "globals of a helper": "{{ raise_exception.__globals__['json'] }}",
    "globals of the environment": "{{ cycler.__init__.__globals__.os.environ }}",
    "the template itself": "{{ self.__init__.__globals__ }}",
    "change of the messages": "{{ messages.append(1) }}",
    "change of a message": "{{ messages[0].update(role='system') }}",
    "a huge loop": "{% for i in range(999999999) %}{% endfor %}",
    "another file": "{% include 'secret' %}",
}


@pytest.mark.parametrize("template", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_is_an_error(template):
    messages = [dict(turn) for turn in TURNS]
    with pytest.raises(ValueError, match="the chat template cannot render these messages"):
        render(template, messages, False)
    assert messages == TURNS


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_a_hidden_attribute_alone_shows_nothing(template):
    assert render(template, TURNS, False) == ""


def test_a_template_may_refuse_with_its_own_words():
    template = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    with pytest.raises(ValueError, match="cannot render these messages: system first"):
        render(template, TURNS, False)


FAULTS = {
    "syntax": "{% if %}",
    "unknown tag": "{% generate %}",
    "unknown filter": "{{ messages | shout }}",
    "attribute of nothing": "{{ tools.names }}",
    "text and number": "{{ 'a' + 1 }}",
    "division by zero": "{{ 1 / 0 }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("template", FAULTS.values(), ids=FAULTS)
def test_a_faulty_template_is_an_error_that_says_so(template):
    with pytest.raises(ValueError, match="the chat template cannot render these messages"):
        render(template, TURNS, False)
