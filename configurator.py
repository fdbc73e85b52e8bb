"""Override files and --key=value for the settings at the top of a script, all of them checked."""
import difflib
import inspect
import linecache
import math
import os
import signal
import sys

# The scripts import this file first: until main() runs, Ctrl-C ends them without a traceback.
if os.path.dirname(os.path.abspath(sys.argv[0])) == os.path.dirname(__file__):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

TYPES = {bool: 'True or False', int: 'an int', float: 'a finite float', str: 'a str'}
BOOLS = {'true': True, 'false': False}


class UserError(Exception):
    """What a user did wrong, in one line: what was wrong, where, and what to do about it."""

    def __init__(self, message):
        super().__init__(' '.join(message.split()))  # a value in it may hold a line break


def run(main):
    """Call a script's main(). A UserError, a file that cannot be read or written, or a lack of
    memory becomes one line and exit status 1."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, 'reconfigure'):               # a terminal may lack some characters
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(str(error))
    except (RuntimeError, MemoryError) as error:
        lack = 'out of memory', "can't allocate"         # CUDA's words, and torch's
        if not (isinstance(error, MemoryError) or any(words in str(error) for words in lack)):
            raise
        sys.exit(f'not enough memory, try a smaller --batch_size: {error!r:.200}')
    except KeyboardInterrupt:
        sys.exit('stopped')


def progress(iterable, what):
    """The iterable, with a progress bar if there is a terminal."""
    from tqdm import tqdm
    first = sys.stderr and os.environ.get('RANK', '0') == '0'    # of torchrun's processes
    return tqdm(iterable, what, leave=False, disable=None if first else True)


def configure(g, checks=(), argv=None, paths=None):
    """Return {name: value} of a script's settings, as `argv` (default: sys.argv[1:]) changes them.

        learning_rate = 3e-4  # a setting: a global int, float, bool or str with a small letter
        CHECKS = [('learning_rate grad_clip', lambda v: v >= 0, 'at least 0')]
        globals().update(configure(globals(), CHECKS))

    Arguments act strictly left to right:
        config/x.py     plain Python that sees the settings and sets them; looked up in the working
                        directory, then beside the script. Modules, functions, classes and _names
                        are free, any other new name is an error
        --key=value     or --key value, or --flag for a bool; dashes in a key are underscores
        --help, -h      print the docstring and every setting, its value so far, its comment; exit
    If `paths` is a list, arguments that are not options are appended to it instead of being run.
    Types never change, except that an int may stand for a float; nan and inf are refused. At the
    end each row of `checks` must hold: names, a predicate, the rule in words. Any mistake raises
    UserError.
    """
    settings = {k: v for k, v in g.items() if k[0].islower() and type(v) in TYPES}
    folder = os.path.dirname(g.get('__file__', ''))
    args = list(sys.argv[1:] if argv is None else argv)
    while args:
        arg = args.pop(0)
        if arg in ('-h', '--help'):
            print(help_text(g, settings))
            sys.exit(0)
        if arg.startswith('-'):
            read_option(arg, args, settings)
            continue
        if paths is not None:
            paths.append(arg)
            continue
        path = arg if os.path.isfile(arg) else os.path.join(folder, arg)
        if not os.path.isfile(path):
            raise UserError(f'no file {arg!r} here or beside the script (a setting is --key=value)')
        run_file(path, settings)
    check(settings, checks)
    return settings


def check(settings, checks):
    """UserError unless each row of `checks` holds: names, a predicate, the rule in words."""
    for names, holds, rule in checks:
        for name in names.split():
            if not holds(settings[name]):
                raise UserError(f'--{name}={settings[name]}: must be {rule}')


def read_option(arg, args, settings):
    """Set what --key=value says; the value of a bare --key is taken from the front of `args`."""
    key, equals, text = arg.partition('=')
    name = key.removeprefix('--').replace('-', '_')  # '-x' becomes '_x', which is never a setting
    if name not in settings:
        raise unknown(key, name, settings)
    kind = type(settings[name])
    if not equals:
        following = args[0] if args else '--'
        if kind is bool and following.lower() not in BOOLS:
            text = 'true'
        elif following.startswith('--'):
            raise UserError(f'{key} needs a value: {key}=...')
        else:
            text = args.pop(0)
    try:
        value = BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = text  # which assign() refuses
    assign(settings, name, value, f'{key}={text}')


def assign(settings, name, value, where):
    """Types must match: to Python True is an int, but a batch size of True is a mistake."""
    kind = type(settings[name])
    if kind is float and type(value) is int and abs(value) < 1e308:  # float() overflows above
        value = float(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        shown = 'int' if type(value) is int else repr(value)  # an int may be too long to print
        raise UserError(f'{where}: {name} must be {TYPES[kind]}, not {shown}')
    settings[name] = value


def run_file(path, settings):
    """Run an override file on a copy of the settings, then assign what it changed."""
    space = {**settings, '__file__': path}
    try:
        with open(path, 'rb') as f:
            code = compile(f.read(), path, 'exec')
        exec(code, space)
    except (Exception, SystemExit) as error:  # the user's own code can raise anything
        frame = error.__traceback__.tb_next  # None if the file does not compile
        line = f':{frame.tb_lineno}' if frame else ''
        raise UserError(f'{path}{line}: {type(error).__name__}: {error}')
    for name, value in space.items():
        if name in settings:
            if value is not settings[name]:  # a default is checked only once it is set
                assign(settings, name, value, path)
        elif not (name.startswith('_') or callable(value) or inspect.ismodule(value)):
            raise unknown(f'{path}: {name}', name, settings)


def unknown(where, name, settings):
    close = difflib.get_close_matches(name, settings, 1)
    hint = f'did you mean {close[0]}?' if close else 'see --help; names of your own begin with _'
    return UserError(f'{where} is not a setting ({hint})')


def help_text(g, settings):
    """The docstring, then the settings with the headings and comments that the source has."""
    rest = dict(settings)
    out = [inspect.cleandoc(g.get('__doc__') or ''), '']
    shown = False                                        # was the line before printed?
    for line in linecache.getlines(g.get('__file__', '')):
        name = line.split('=')[0].strip()
        goes_on = shown and line.strip().startswith('#')
        shown = name in rest or line.startswith('# --- ') or goes_on
        if name in rest:
            _, mark, comment = line.partition('  #')
            setting = f'--{name}={rest.pop(name)!r}'
            line = f'{setting:<32}{mark}{comment}'
        if shown:
            out.append(line.rstrip())
    out += [f'--{name}={value!r}' for name, value in rest.items()]  # defined in other files
    return '\n'.join(out).strip()
