"""The code that a data set is made from: prepare.py refuses to continue a set that was made by other code."""
import ast
import hashlib
import inspect
import os
import sys
import textwrap

from configurator import ROOT

FOLDERS = ROOT, os.path.join(ROOT, 'support')


def is_ours(value):
    """Whether this is a function or a class of the project. Exceptions do not count, because no result depends on them."""
    if not inspect.isfunction(value) and not inspect.isclass(value):
        return False
    if inspect.isclass(value) and issubclass(value, BaseException):
        return False
    file = getattr(sys.modules.get(value.__module__), '__file__', None)
    return file is not None and os.path.dirname(os.path.abspath(file)) in FOLDERS


def changes_a_result(statement):
    """Whether a result may depend on a statement: not on a docstring, and not on a raise."""
    docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return not docstring and not isinstance(statement, ast.Raise)


def code_of(function):
    """The syntax tree of a function or class, without comments, docstrings and raise statements."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(getattr(node, 'body', None), list):
            node.body = [statement for statement in node.body if changes_a_result(statement)]
    return tree


def written(node):
    """A syntax tree as text, the same in every version of Python: ast.unparse and ast.dump differ between versions."""
    if isinstance(node, list):
        items = [written(item) for item in node]
        return f'[{", ".join(items)}]'
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        # A later version has more fields. They are empty unless its syntax is used.
        if value is not None and value != []:
            fields.append(f'{name}={written(value)}')
    return f'{type(node).__name__}({", ".join(fields)})'


def names_in(tree, module):
    """The names that code of a module uses → pairs (module, name). `data.GRAVITY` gives (data, 'GRAVITY')."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield module, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            other = getattr(module, node.value.id, None)
            if inspect.ismodule(other):
                yield other, node.attr


def depends_on(functions):
    """
    What the results of functions (or classes) depend on → {'constants': {'data.GRAVITY': 9.81, ...}, 'code': sha256}.

    It includes the functions and classes of the project that they name, those that these name, and so on. A constant is a
    name in capitals.
    """
    constants = {}
    code = {}
    waiting = list(functions)
    while waiting:
        function = waiting.pop()
        if function in code:
            continue
        tree = code_of(function)
        code[function] = written(tree)
        for module, name in names_in(tree, sys.modules[function.__module__]):
            value = getattr(module, name, None)
            if is_ours(value):
                waiting.append(value)
            elif name.isupper() and isinstance(value, (int, float, str, tuple, list, dict)):
                # The name of the file, because the script that runs is called __main__.
                module_name = inspect.getmodulename(module.__file__)
                constants[f'{module_name}.{name}'] = value
    text = '\n'.join(sorted(code.values()))
    return {'constants': constants, 'code': hashlib.sha256(text.encode()).hexdigest()}
