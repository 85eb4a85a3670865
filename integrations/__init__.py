"""Drafters that cope with someone else's checkpoint format or idea, each a plugin that the core knows nothing of.

Installed as `ppd_compose.integrations`.
"""
