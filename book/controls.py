"""Moves every control of a chapter, and fails where nothing changes.

A cell marked `#| live` hands a function to `interact` of ipywidgets, which shows its controls to
whoever has a kernel. While the book is built nobody sits there. Then `watch` takes the place of
`interact`: it keeps the functions, and after the chapter's last cell `try_all` calls each of them
at both ends of each control. Another figure or another line of text must come out, and the same
from the same end. And no name that a function uses may have been set anew by then: who has run all
cells would move something else.
"""

import dis
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
        self.given.append((function, controls, used_by(function)))
        return function

    def try_all(self):
        for function, controls, before in self.given:
            after = used_by(function)
            changed = [name for name in after if after[name] is not before.get(name)]
            if changed:
                names = ", ".join(changed)
                raise AssertionError(f"{function.__name__}: a later cell sets {names} anew")
            resting = defaults(function, controls)
            for name, control in controls.items():
                start, end = (resting | {name: one} for one in ends(control))
                first, again, last = (shown(function, at) for at in (start, start, end))
                if first != again:
                    raise AssertionError(
                        f"{function.__name__} shows something else each time; seed its noise"
                    )
                if ("", []) in (first, last):
                    raise AssertionError(f"{function.__name__} shows nothing")
                if first == last:
                    raise AssertionError(f"{function.__name__}: moving {name} changes nothing")


def names_in(code):
    "The global names of a function's code, and of the functions and loops in it."
    own = {one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"}
    return own.union(*(names_in(inner) for inner in code.co_consts if inspect.iscode(inner)))


def used_by(function, seen=()):
    "The chapter's own values that a function uses, and those that its own functions use."
    own = function.__globals__
    used = {name: own.get(name) for name in names_in(function.__code__) if name in own}
    for value in list(used.values()):
        if inspect.isfunction(value) and value.__globals__ is own and value not in seen:
            used = used_by(value, (*seen, function)) | used
    return used


def ends(control):
    "The first and the last value of a slider or a list, written out or as a widget."
    if hasattr(control, "options"):
        control = list(control.options)
    if hasattr(control, "max"):
        return control.min, control.max
    if not isinstance(control, tuple | list):
        raise AssertionError(f"write the control {control!r} as a tuple, a list or a widget")
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
