"""What `--shell-completion install=SHELL` prints: each asks soup for candidates for the line up to the cursor.

Hydra's own scripts complete a program or a script; they know no `python -m`, and for zsh there is none.
"""

from __future__ import annotations

BASH = """\
soup_completion()
{
    local line="${COMP_LINE:0:$COMP_POINT}"
    local words=($line)
    local ask=("${words[0]}")
    case "${words[0]}" in
        *python*)
            if [ "${words[1]} ${words[2]}" != "-m soup" ]; then return; fi
            ask=("${words[0]}" -m soup) ;;
    esac
    local last=""
    case "$line" in *" ") ;; *) last="${words[${#words[@]}-1]}" ;; esac
    COMPREPLY=($(compgen -W "$(COMP_LINE="$line" "${ask[@]}" -sc query=bash 2> /dev/null)" -- "$last"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F soup_completion NAMES
"""
ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
_soup()
{
    local -a ask found
    ask=("${words[1]}")
    if [[ "${words[1]}" == *python* ]]; then
        if [[ "${words[2]} ${words[3]}" != "-m soup" ]]; then _default; return; fi
        ask+=(-m soup)
    fi
    found=("${(@f)$(COMP_LINE="$LBUFFER" "${ask[@]}" -sc query=zsh 2> /dev/null)}")
    if [[ -z "$found" ]]; then _files; return; fi
    compadd -Q -S '' -a found
}
compdef _soup NAMES
"""
FISH = """\
function __soup_complete
    set -l words (commandline -opc)
    set -l ask $words[1]
    if string match -q '*python*' -- $words[1]
        test "$words[2] $words[3]" = "-m soup"; or return
        set ask $words[1] -m soup
    end
    set -lx COMP_LINE (commandline -cp | string collect)
    set -l found ($ask -sc query=fish 2> /dev/null | string match -v '')
    if set -q found[1]
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
for name in NAMES
    complete -c $name -f -a '(__soup_complete)'
end
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
UNINSTALL = {
    "bash": "complete -r NAMES",
    "zsh": "compdef -d NAMES",
    "fish": "for name in NAMES; complete -e -c $name; end",
}


def script(verb: str, shell: str, names: str) -> str:
    """The script for programs of these names."""
    return (SCRIPTS if verb == "install" else UNINSTALL)[shell].replace("NAMES", names)
