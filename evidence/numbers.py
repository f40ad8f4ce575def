"""How a report writes numbers."""


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def signed(difference: float) -> str:
    """In percentage points, with a sign (a true minus) unless it rounds to 0."""
    points = round(100 * difference, 1)
    return f"{points:+.1f}".replace("-", "−") if points else "0.0"


def p_value(p: float) -> str:
    if p >= 0.001:
        return f"p = {p:.3f}"
    if p < 1e-15:
        return "p < 10⁻¹⁵"
    digits, power = f"{p:.0e}".split("e-")
    return f"p = {digits} × 10{_raised(-int(power))}"


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
