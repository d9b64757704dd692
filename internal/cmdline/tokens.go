package cmdline

import (
	"cmp"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// TokensCommand lists what a module has.
func TokensCommand() *cli.Command {
	return &cli.Command{
		Name: "tokens", Usage: "list the slots and tokens of a PKCS #11 module, and the URI of each token",
		ArgsUsage: "[MODULE]",
		Description: "MODULE is the path of the module; without it, it is that of --token. No PIN is needed, and " +
			"nothing is changed.",
		Flags: []cli.Flag{Token, JSON}, Action: tokens,
	}
}

func tokens(c *cli.Context) error {
	of := cmp.Or(c.Args().First(), c.String("token"))
	if of == "" {
		return usage.Errorf("name a PKCS #11 module, for example %s /usr/lib/softhsm/libsofthsm2.so, or a token of it "+
			"with --token", c.Command.HelpName)
	}
	slots, module, err := hsmkeys.Slots(of)
	if err != nil {
		return err
	}
	return Print(c, map[string]any{"module": module, "slots": slots}, func(w io.Writer) {
		line := func(name, value string) {
			if value != "" {
				fmt.Fprintf(w, "    %-12s %s\n", name, value)
			}
		}
		for _, s := range slots {
			fmt.Fprintf(w, "slot %d  %s\n", s.ID, s.Description)
			switch {
			case s.Problem != "":
				line("problem", s.Problem)
				continue
			case !s.Present:
				line("token", "none")
				continue
			case !s.Initialised:
				line("token", "not initialised: C_InitToken, by the HSM's own tool, makes it one")
				line("model", s.Manufacturer+" "+s.Model)
				continue
			}
			line("token", s.Label)
			line("serial", s.Serial)
			line("model", fmt.Sprintf("%s %s, firmware %s", s.Manufacturer, s.Model, s.Firmware))
			line("user PIN", map[bool]string{true: "set", false: "not set: the security officer sets it"}[s.UserPIN])
			line("PINs", strings.Join(s.PINs, "; "))
			line("free", room(s))
			line("URI", s.URI)
		}
		fmt.Fprintf(w, "%d slots in %s\n", len(slots), module)
	})
}

// room is how much memory a token says that it has left.
func room(s hsmkeys.Slot) string {
	var parts []string
	for _, p := range []struct {
		free *uint
		of   string
	}{{free: s.FreePublic, of: "public"}, {free: s.FreePrivate, of: "private"}} {
		if p.free != nil {
			parts = append(parts, fmt.Sprintf("%d bytes for %s objects", *p.free, p.of))
		}
	}
	return strings.Join(parts, ", ")
}
