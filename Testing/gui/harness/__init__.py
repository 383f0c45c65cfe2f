"""Slicer's panels without Slicer: real MRML from slicer-core, Qt from PySide6 with PythonQt's manners.

What no package gives (ctk, qMRML widgets, slicer.app, the module base classes) has a stand-in here. Every public name
of a stand-in is one that Slicer has (widgets.json), so code that runs here uses no invented name. What this does not
prove: how the real widgets behave in detail, PythonQt's ownership of objects, views and layouts, CMake, module
discovery, dialogs, Slicer's own Python and its pip.
"""
