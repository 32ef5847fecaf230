"""What would act in a format is text in it, and what would not is left as it is."""

from __future__ import annotations

import pytest

from iexact_runner.report.inert import to_cell, to_figure, to_html, to_markdown, to_tex

PLAIN = "kept_frac 0.125, d = 16, test accuracy [%] (x/y): 5"


@pytest.mark.parametrize("write", [to_cell, to_html, to_figure])
def test_plain_text_is_as_it_was(write):
    assert write(PLAIN) == PLAIN


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=A1", "'=A1"), ("+1", "'+1"), ("-1 | 2", "'-1 | 2"), ("@SUM", "'@SUM"), ("\t=1", r"\t=1"), ("\r=1", r"\r=1"),
        (-1, -1), (-2.5, -2.5), (True, True), (None, None), ([-1], "[-1]"), ("a\nb", r"a\nb"),
    ],
)  # fmt: skip
def test_no_text_is_a_formula_and_numbers_are_numbers(value, cell):
    assert to_cell(value) == cell


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (PLAIN, PLAIN),
        ("<img src=x> & a|b", r"&lt;img src=x&gt; &amp; a\|b"),
        ("![a](http://b) [c][d]", r"!\[a\](http\://b) [c\][d]".replace(r"!\[", "![")),
        ("`a` *b* _c_ ~d~ \\", r"\`a\` \*b\* \_c\_ \~d\~ \\"),
        ("www.example.org\n# x", r"www\.example.org\\n# x"),
    ],
)
def test_markdown(text, written):
    assert to_markdown(text) == written


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("kept_frac 50% & #1 {$}", r"kept\_frac 50\% \& \#1 \{\$\}"),
        ("\\input{x}^~", r"\textbackslash{}input\{x\}\textasciicircum{}\textasciitilde{}"),
        ("a\n\\b", r"a\textbackslash{}n\textbackslash{}b"),
        ("[5cm] x [%]", r"{[}5cm] x [\%]"),
        ("*", "{*}"),
        ("-0.5 ± 0.1", r"$-$0.5 $\pm$ 0.1"),
    ],
)
def test_latex(text, written):
    assert to_tex(text) == written


def test_html_and_labels_of_figures():
    assert to_html("<b>\x1b&\u202e") == r"&lt;b&gt;\x1b&amp;\u202e"
    assert to_figure("$x$\n") == r"\$x\$\n" and to_figure("_x") == " _x" and len(to_figure("x" * 1000)) < 400
