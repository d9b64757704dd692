package cmdline

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/kmehsm/kmehsm/internal/terminal"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// Yes is the flag of the commands that ask: see Confirm.
var Yes = &cli.BoolFlag{Name: "yes", Usage: "do not ask whether it is meant: for scripts, since nothing undoes it"}

// Confirm asks before an action that cannot be undone. It prints to standard error what will be lost, and wants name
// typed on standard input, or --yes. On an error, nothing may be done. If what is empty, nothing is lost, and it asks
// nothing.
func Confirm(c *cli.Context, what, name string) error {
	if what == "" {
		return nil
	}
	fmt.Fprintf(c.App.ErrWriter, "%s\n", what)
	if c.Bool(Yes.Name) {
		return nil
	}
	fmt.Fprintf(c.App.ErrWriter, "This cannot be undone. Type %s to go on: ", name)
	typed, err := readLine(c.Context)
	if err != nil || !terminal.Is(os.Stdin) { // no Enter ended the line
		fmt.Fprintln(c.App.ErrWriter)
	}
	switch {
	case typed == name:
		return nil
	case typed != "" || err == nil:
		return fmt.Errorf("nothing was changed: what was typed is not %s", name)
	case errors.Is(err, io.EOF):
		return usage.Errorf("nothing was changed: nobody typed %s; if it is meant, run the same command with --%s",
			name, Yes.Name)
	}
	return fmt.Errorf("nothing was changed: %w", err)
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
