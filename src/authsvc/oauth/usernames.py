"""Names that people log in with: which there are, and when two are one."""

from unicodedata import category, normalize

USERNAME_CHARS_MAX = 254


def username_key(username: str) -> str:
    """A name as it is compared: without regard to case and to compatible forms of a character.

    Compatibility caseless matching (Unicode 3.13, D146), composed.
    """
    folded = normalize("NFKD", normalize("NFD", username).casefold())
    return normalize("NFKC", folded.casefold())


def is_username(text: str) -> bool:
    """Whether somebody may have this name: all of it can be seen, and where it ends."""
    if not 0 < len(text) <= USERNAME_CHARS_MAX or text != text.strip():
        return False
    return not any(category(char) in _UNSEEN for char in text) and bool(username_key(text))


_UNSEEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})
