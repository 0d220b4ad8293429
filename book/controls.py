"""Moves every control of a chapter, and fails where nothing changes.

A cell marked `#| live` hands a function to `interact` of ipywidgets, which shows its controls to
whoever has a kernel. While the book is built nobody sits there. Then `watch` takes the place of
`interact`: it keeps the functions, and after the chapter's last cell `try_all` calls each of them
at both ends of each control. Another figure or another line of text must come out.
"""

import inspect

import ipywidgets
from IPython.utils.capture import capture_output
from matplotlib_inline.backend_inline import flush_figures


class Watch:
    "Stands for `interact`, and knows afterwards what it was given."

    def __init__(self):
        self.given = []

    def __call__(self, function=None, **controls):
        if function is None:  # as a decorator
            return lambda function: self(function, **controls)
        self.given.append((function, controls))
        return function

    def try_all(self):
        for function, controls in self.given:
            resting = defaults(function, controls)
            for name, control in controls.items():
                first, last = (shown(function, resting | {name: end}) for end in ends(control))
                if ("", []) in (first, last):
                    raise AssertionError(f"{function.__name__} shows nothing")
                if first == last:
                    raise AssertionError(f"{function.__name__}: moving {name} changes nothing")


def ends(control):
    "The first and the last value of a slider or a list, written out or as a widget."
    if hasattr(control, "options"):
        control = list(control.options)
    if hasattr(control, "max"):
        return control.min, control.max
    return (control[0], control[1]) if isinstance(control, tuple) else (control[0], control[-1])


def defaults(function, controls):
    "Where each control rests before it is moved."
    parameters = inspect.signature(function).parameters
    return {
        name: control.value if hasattr(control, "value") else parameters[name].default
        for name, control in controls.items()
    }


def shown(function, values):
    "The pictures and the text of one call."
    with capture_output() as captured:
        function(**values)
        flush_figures()
    return captured.stdout, [output.data for output in captured.outputs]


def watch():
    ipywidgets.interact = Watch()
