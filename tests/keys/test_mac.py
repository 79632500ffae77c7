"""What passes through Redis is believed only where one of our keys marked it, for its place."""

from authsvc.keys.secrets import Mac, Sealer

OLD, NEW = b"o" * 32, b"n" * 32
ISSUER = "https://one.test"


def test_a_mark_is_good_for_its_label_its_issuer_and_its_key_alone() -> None:
    mac = Mac(Sealer((NEW,)), ISSUER)
    sealed = mac.seal("label", b"payload")
    assert mac.open("label", sealed) == b"payload"
    assert mac.open("labe", sealed) is None
    assert mac.open("", b"label" + sealed) is None
    assert Mac(Sealer((NEW,)), "https://two.test").open("label", sealed) is None
    assert Mac(Sealer((OLD,)), ISSUER).open("label", sealed) is None


def test_a_byte_changed_or_missing_is_not_believed() -> None:
    mac = Mac(Sealer((NEW,)), ISSUER)
    sealed = mac.seal("label", b"payload")
    for at in range(len(sealed)):
        assert mac.open("label", sealed[:at]) is None
        changed = bytes([*sealed[:at], sealed[at] ^ 1, *sealed[at + 1 :]])
        assert mac.open("label", changed) is None
    assert mac.open("label", mac.seal("label", b"")) == b""


def test_what_an_older_key_marked_is_believed_while_keys_change() -> None:
    sealed = Mac(Sealer((OLD,)), ISSUER).seal("label", b"payload")
    assert Mac(Sealer((NEW, OLD)), ISSUER).open("label", sealed) == b"payload"
    fresh = Mac(Sealer((NEW, OLD)), ISSUER).seal("label", b"payload")
    assert Mac(Sealer((OLD,)), ISSUER).open("label", fresh) is None


def test_it_does_not_show_its_keys() -> None:
    assert OLD.decode() not in repr(Mac(Sealer((OLD,)), ISSUER))
