"""Drafters that cope with someone else's checkpoint format or idea, each a plugin that uses public names only.

Installed as `ppd_compose.integrations`. The core never imports this package.
"""
