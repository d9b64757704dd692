package cmdline

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/terminal"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// Yes is the flag of the commands that ask: see Confirm.
var Yes = &cli.BoolFlag{Name: "yes", Usage: "do not ask whether it is meant: for scripts, since nothing undoes it"}

// Confirm asks before an action that cannot be undone. It prints to standard error what will be lost, and wants name
// typed on a terminal. Without a terminal, it wants --yes. On an error, nothing may be done. If what is
// empty, nothing is lost, and it asks nothing.
func Confirm(c *cli.Context, what, name string) error {
	if what == "" {
		return nil
	}
	fmt.Fprintf(c.App.ErrWriter, "%s\n", what)
	if c.Bool(Yes.Name) {
		return nil
	}
	if !terminal.Is(os.Stdin) || !terminal.Is(c.App.ErrWriter) {
		return usage.Errorf("nothing was changed: this cannot be undone, and nobody sits at a terminal to be asked; "+
			"if it is meant, run the same command with --%s", Yes.Name)
	}
	fmt.Fprintf(c.App.ErrWriter, "This cannot be undone. Type %s to go on: ", name)
	typed, err := readLine(c.Context)
	if err != nil {
		fmt.Fprintln(c.App.ErrWriter)
		return fmt.Errorf("nothing was changed: %w", err)
	}
	if typed != name {
		return fmt.Errorf("nothing was changed: what was typed is not %s", name)
	}
	return nil
}

// readLine reads a line from standard input. It ends with the context, which Ctrl-C ends.
func readLine(ctx context.Context) (string, error) {
	type result struct {
		line string
		err  error
	}
	done := make(chan result, 1)
	go func() {
		line, err := bufio.NewReader(os.Stdin).ReadString('\n')
		done <- result{line: strings.TrimSpace(line), err: err}
	}()
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case r := <-done:
		return r.line, r.err
	}
}
