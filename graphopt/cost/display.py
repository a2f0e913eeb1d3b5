"""Expressions as people read them."""

from __future__ import annotations

import sympy

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MOST_TERMS = 6


def format_expr(expression: sympy.Expr | float) -> str:
    """A pure number with a unit (`22.7M`), anything else as a sum, highest powers last, shortened where it is long."""
    expression = sympy.sympify(expression)
    if expression.is_number:
        return format_number(float(expression))
    terms = sorted(sympy.Add.make_args(sympy.expand(expression)), key=_order)
    shown = [_term(term) for term in (terms if len(terms) <= _MOST_TERMS + 2 else terms[-_MOST_TERMS:])]
    if len(shown) < len(terms):
        shown.insert(0, f"({len(terms) - len(shown)} smaller terms)")
    return " + ".join(shown).replace("+ -", "- ")


def format_number(value: float) -> str:
    """Three significant digits and a unit: `950`, `1.5k`, `22.7M`, `4.35G`."""
    for scale, unit in _UNITS:
        # 999.6k would be spelt 1e+03k.
        if abs(value) >= scale * 0.9995:
            return f"{float(f'{value / scale:.3g}'):g}{unit}"
    return f"{float(f'{value:.3g}'):g}"


def growth(expression: sympy.Expr, symbol: sympy.Symbol) -> str:
    """How the expression grows in one symbol: `O(seq**2)`."""
    degree = growth_degree(expression, symbol)
    if degree is None:
        return "?"
    return "O(1)" if degree == 0 else f"O({symbol})" if degree == 1 else f"O({symbol}**{degree})"


def growth_degree(expression: sympy.Expr, symbol: sympy.Symbol) -> int | None:
    """The highest power of the symbol; a rounded-down quotient grows like the quotient."""
    smooth = sympy.expand(expression.replace(sympy.floor, lambda x: x))
    if not smooth.is_polynomial(symbol):
        return None
    return int(sympy.degree(smooth, symbol)) if smooth != 0 else 0


def _order(term: sympy.Expr) -> tuple[int, str]:
    powers = term.as_powers_dict()
    return sum(int(p) for base, p in powers.items() if base.free_symbols and p.is_Integer), str(term)


def _term(term: sympy.Expr) -> str:
    return str(term)
