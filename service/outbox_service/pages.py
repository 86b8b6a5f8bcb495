"""The HTML page that a browser gets for a verification link."""

from html import escape

from litestar import MediaType, Response

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Robots-Tag": "noindex",
}
"""Headers of a link's answers, in addition to those of every answer."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 1.1rem/1.5 system-ui, sans-serif; max-width: 32rem; margin: 15vh auto; padding: 0 1rem; }}
button {{ font: inherit; padding: .5rem 1.25rem; border: 0; border-radius: .4rem; color: #fff; background: #1a5fb4; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{text}</p>
{form}</body>
</html>
"""

# A form without action posts to the URL of the page, which carries the code.
_FORM = '<form method="post"><button>Verify my email address</button></form>\n'


def page(title: str, text: str, *, status_code: int = 200, with_button: bool = False) -> Response[str]:
    """Returns an HTML page.

    Args:
        title: the heading.
        text: the paragraph below it.
        status_code: the HTTP status.
        with_button: adds the button that verifies the address.
    """
    return Response(
        _PAGE.format(title=escape(title), text=escape(text), form=_FORM if with_button else ""),
        media_type=MediaType.HTML,
        status_code=status_code,
        headers=HEADERS,
    )
