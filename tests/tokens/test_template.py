"""A conversation's text is what transformers makes of it, to the character."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.tokens.templates_written import CONVERSATIONS, NAMES, TEMPLATES, TOOLS
from tests.tokens.tokenizers_made import gpt_2
from thermocline.clock import ManualClock, SystemClock
from thermocline.errors import ModelError, RequestError
from thermocline.tokens.template import SECONDS_MAX, Template, load_template


@pytest.fixture(scope="module", params=TEMPLATES)
def both(request):
    """A template as ours, and in transformers' hands."""
    source = TEMPLATES[request.param]
    theirs = PreTrainedTokenizerFast(tokenizer_object=gpt_2(), chat_template=source, **NAMES)
    return Template(source, theirs.special_tokens_map, clock=SystemClock()), theirs


def same(both, messages, **options):
    ours, theirs = both
    variables = {name: options.pop(name) for name in ("enable_thinking", "mode", "date_string") if name in options}
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, **options, **variables)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError):
        with pytest.raises(RequestError, match="refuses"):
            ours.render(messages, **options, variables=variables)
        return
    assert ours.render(messages, **options, variables=variables) == expected


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_templates_say_what_transformers_says(both, name, tools):
    """Turns, tools, calls, reasoning, parts, and what a template refuses: all as transformers has it."""
    for add in (True, False):
        same(both, CONVERSATIONS[name], tools=tools, add_generation_prompt=add)
    same(both, CONVERSATIONS[name], tools=tools, add_generation_prompt=True, enable_thinking=False, mode="<odd>")


roles = st.sampled_from(["user", "assistant", "system", "tool", "developer"])
contents = st.one_of(
    st.none(), st.text(max_size=20), st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text()}))
)
fields = {"name": st.text(max_size=5), "tool_call_id": st.just("abcdefghi"), "reasoning_content": st.text(max_size=9)}
messages = st.fixed_dictionaries({"role": roles, "content": contents}, optional=fields)


@given(st.lists(messages, min_size=1, max_size=6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_conversation_is_the_same(both, said, add):
    """Whatever the messages, ours and transformers' agree, or both refuse."""
    same(both, said, add_generation_prompt=add, date_string="1 Jan 2026")


def test_the_date_is_the_clocks():
    """A template that writes the date reads the clock that it was given."""
    clock = ManualClock(86_400.0 * 365)
    template = Template("{{ strftime_now('%Y-%m-%d %H') }}", {}, clock=clock)
    assert template.render([]) == datetime.fromtimestamp(clock.seconds, UTC).astimezone().strftime("%Y-%m-%d %H")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include 'other' %}",
        "{{ 10 / 0 }}",
        "{{ range(1000000) | list }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_stay_in_their_sandbox(source):
    """What reaches out of a template, changes its messages or never ends is refused."""
    with pytest.raises(RequestError, match="refuses"):
        Template(source, {}, clock=SystemClock()).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("body", ["", "x"])
def test_templates_end_in_time(body):
    """A loop that goes on for longer than allowed is ended, whether it says something or not."""

    class Fast(ManualClock):
        def now(self):
            self.seconds += SECONDS_MAX / 1000
            return self.seconds

    source = "{% for a in range(9999) %}{% for b in range(9999) %}" + body + "{% endfor %}{% endfor %}"
    with pytest.raises(RequestError, match="takes longer"):
        Template(source, {}, clock=Fast()).render([])


def test_templates_say_so_much_and_no_more(monkeypatch):
    """A text that grows beyond all bounds is cut off while it grows."""
    monkeypatch.setattr("thermocline.tokens.template.TEXT_CHARACTERS_MAX", 100_000)
    with pytest.raises(RequestError, match="says more"):
        Template("{% for a in range(99999) %}{{ 'words' * 9 }}{% endfor %}", {}, clock=SystemClock()).render([])


def test_what_is_no_template_is_told_at_once():
    """A template that cannot be compiled is refused when the model is loaded."""
    with pytest.raises(RequestError, match="is none"):
        Template("{% for %}", {}, clock=SystemClock())


def test_templates_are_found_where_models_keep_them(tmp_path):
    """A file of its own wins over the configuration, which has one template or several by name."""
    clock = SystemClock()
    assert load_template(tmp_path, {}, clock=clock) is None
    named = {"chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]}
    several = load_template(tmp_path, named, clock=clock)
    assert several.render([]) == "plain"
    assert several.render([], tools=TOOLS) == "tools"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ bos_token }}"}))
    assert load_template(tmp_path, {"bos_token": {"content": "<s>"}}, clock=clock).render([]) == "<s>"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_template(tmp_path, named, clock=clock).render([]) == "from the file"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ModelError):
        load_template(tmp_path, {}, clock=clock)


def test_templates_tell_the_form_they_want():
    """Only templates that walk through a message's parts are given parts."""
    wants = {name: Template(source, NAMES, clock=SystemClock()).in_parts for name, source in TEMPLATES.items()}
    assert {name for name, parts in wants.items() if parts} == {"gemma", "odd"}
