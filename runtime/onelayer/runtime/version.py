"""The version of the installed package."""


def installed_version() -> str:
    """Return the installed version, or text that says that this folder was never installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("onelayer")
    except PackageNotFoundError:
        return "0+not.installed"
