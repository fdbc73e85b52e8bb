"""Override files and --key=value for the settings at the top of a script: nanoGPT's configurator, made safe."""
import ast, difflib, inspect, linecache, math, os, sys, tokenize

KINDS = {bool: 'True or False', int: 'an int', float: 'a finite float', str: 'a str'}
BOOLS = {'true': True, '1': True, 'false': False, '0': False}


def configure(g, argv=None):
    """Return {name: value} of a script's settings, overridden as `argv` (default: sys.argv[1:]) asks.

        learning_rate = 3e-4  # a setting: a global int, float, bool or str without a leading '_'
        globals().update(configure(globals()))

    Arguments act strictly left to right:
        config/owt.py   plain Python that sees the settings and sets them; looked up here, then beside
                        the script. Imports, functions and _names are free, any other new name is an error
        --key=value     or --key value, or --flag for a bool; dashes in a key are underscores
        --help, -h      the docstring, then every setting with its value so far and its comment; exit
    Types never change, save that an int may stand for a float, and a typed 1e6 for an int; nan and inf are
    refused. Any mistake ends the program with one line (SystemExit).
    """
    now = {k: v for k, v in g.items() if not k.startswith('_') and type(v) in KINDS}
    beside = os.path.dirname(g.get('__file__') or '')
    args = list(sys.argv[1:] if argv is None else argv)
    while args:
        arg = args.pop(0)
        if arg in ('-h', '--help'):
            print(_help(g, now))
            raise SystemExit(0)
        if not arg.startswith('-'):
            path = arg if os.path.isfile(arg) else os.path.join(beside, arg)
            if not os.path.isfile(path):
                raise _stop(f'no file {arg!r} here or beside the script (a setting is --key=value)')
            _run_file(path, now)
            continue
        key, equals, text = arg.partition('=')
        name = key.removeprefix('--').replace('-', '_')  # '-x' becomes '_x', which is never a setting
        if name not in now:
            raise _stop(f'{key} is not a setting (--help lists them)', name, now)
        if not equals and type(now[name]) is bool:
            text = args.pop(0) if args and args[0].lower() in BOOLS else 'true'
        elif not equals:
            if not args or args[0].startswith('--'):
                raise _stop(f'{key} needs a value: {key}=...')
            text = args.pop(0)
        _set(now, name, _parse(text, type(now[name])), f'{key}={text}')
    return now


def _parse(text, kind):
    """A command-line word as a `kind`, or the word itself if it is none: _set refuses it then."""
    try:
        if kind is int and 'e' in text.lower() and float(text).is_integer() and abs(float(text)) < 2**53:
            return int(float(text))  # 1e6; above 2**53 a float may not be the number that was typed
        return BOOLS.get(text.lower(), text) if kind is bool else kind(text)
    except ValueError:
        return text


def _set(now, name, value, where):
    """Types must match exactly: to Python True is an int, but a batch size of True is a mistake."""
    kind = type(now[name])
    if kind is float and type(value) is int and abs(value) < 2**1023:  # float() overflows above
        value = float(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        shown = repr(value) if isinstance(value, (str, float, bool)) else type(value).__name__
        raise _stop(f'{where}: {name} must be {KINDS[kind]}, not {shown}')
    now[name] = value


def _run_file(path, now):
    """Run an override file on a copy of the settings, then take over into `now` what it set."""
    space = {**now, '__file__': path}
    try:
        with open(path, 'rb') as f:
            tree = compile(f.read(), path, 'exec', ast.PyCF_ONLY_AST)
        exec(compile(tree, path, 'exec'), space)
    except (Exception, SystemExit) as e:
        ran = e.__traceback__.tb_next  # the file's own frame; None if it never got to run
        line = ran.tb_lineno if ran else getattr(e, 'lineno', None) or 1
        raise _stop(f'{path}:{line}: {type(e).__name__}: {getattr(e, "msg", e)}')
    # I look for assignments in the source, not for new globals, so that `from math import pi` stays free.
    lines = {n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for name, value in space.items():
        where = f'{path}:{lines[name]}' if name in lines else path
        free = name not in lines or name.startswith('_') or callable(value) or inspect.ismodule(value)
        if name in now and value is not now[name]:
            _set(now, name, value, where)
        elif name not in now and not free:
            raise _stop(f'{where}: {name} is not a setting (names of your own begin with _)', name, now)


def _help(g, now):
    """The docstring, then the settings as the source has them (order, headings, comments), at their values now."""
    lines, rest, end = linecache.getlines(g.get('__file__') or ''), dict(now), 0
    notes = {t.start[0]: t.string for t in tokenize.generate_tokens(iter(lines).__next__) if t.type == tokenize.COMMENT}
    out = [inspect.cleandoc(g.get('__doc__') or ''), '']
    for node in ast.parse(''.join(lines)).body:
        above = [line.strip() for line in lines[end:node.lineno - 1]]  # between statements: comments, blanks
        end = node.end_lineno
        note = ' '.join(notes[i] for i in range(node.lineno, end + 1) if i in notes)
        for n in ast.walk(node) if isinstance(node, (ast.Assign, ast.AnnAssign)) else ():
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id in rest:
                out += above + [f'{f"--{n.id}={rest.pop(n.id)!r}":<33} {note}'.rstrip()]
                above = []
    out += [f'--{name}={value!r}' for name, value in rest.items()]  # no source at hand, or set in a loop
    return '\n'.join(out).replace('\n\n\n', '\n\n').strip()


def _stop(text, wrong='', names=()):
    """An exit that prints one line, however many an exception's text had, and guesses what a wrong name meant."""
    close = difflib.get_close_matches(wrong, names, 1)
    return SystemExit(' '.join(text.split()) + (f'; did you mean {close[0]}?' if close else ''))
