package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/pflag"
)

func completionCommand() *command {
	return &command{name: "completion", args: "bash | zsh", summary: "Print a shell completion script",
		long: "For bash: novalet completion bash >/etc/bash_completion.d/novalet\nFor zsh, in .zshrc: source <(novalet completion zsh)",
		run: func(_ context.Context, fs *pflag.FlagSet) error {
			switch {
			case fs.NArg() == 1 && fs.Arg(0) == "bash":
				fmt.Print(bashCompletion())
			case fs.NArg() == 1 && fs.Arg(0) == "zsh":
				fmt.Print("autoload -U +X bashcompinit && bashcompinit\n" + bashCompletion())
			default:
				return usageError("want bash or zsh")
			}
			return nil
		}}
}

// bashCompletion is made from the command table, so that it cannot fall behind.
func bashCompletion() string {
	var b strings.Builder
	b.WriteString("_novalet() {\n  local cur=${COMP_WORDS[COMP_CWORD]} cmd=${COMP_WORDS[1]} opts= what=\n  COMPREPLY=()\n")
	fmt.Fprintf(&b, "  if [ \"$COMP_CWORD\" = 1 ]; then COMPREPLY=($(compgen -W '%s help' -- \"$cur\")); return; fi\n  case $cmd in\n", strings.Join(names(), " "))
	for _, c := range commands() {
		var opts []string
		flagSet(c).VisitAll(func(f *pflag.Flag) { opts = append(opts, "--"+f.Name) })
		fmt.Fprintf(&b, "    %s) opts='%s' what=%s ;;\n", c.name, strings.Join(opts, " "), c.complete)
	}
	b.WriteString(`    help) COMPREPLY=($(compgen -W '` + strings.Join(names(), " ") + `' -- "$cur")); return ;;
  esac
  if [ "$what" = instance ] && [ "${cur#-}" = "$cur" ]; then
    COMPREPLY=($(compgen -W "$(novalet ps -q 2>/dev/null)" -- "$cur"))
  else
    COMPREPLY=($(compgen -W "$opts" -- "$cur"))
  fi
}
complete -o default -F _novalet novalet
`)
	return b.String()
}
