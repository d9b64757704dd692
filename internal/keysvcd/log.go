package keysvcd

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/keysvcd/settings"
	"github.com/kmehsm/kmehsm/internal/terminal"
	"github.com/kmehsm/kmehsm/internal/version"
	"github.com/kmehsm/kmehsm/kme"
)

// newLog makes the log: JSON lines, or text if w is a terminal. Hashes of IMSIs and IMEIs are keyed: there are so few
// of these that anybody could reverse a plain hash.
func newLog(w io.Writer, cfg *settings.Config) (*slog.Logger, error) {
	o := slog.HandlerOptions{Level: cfg.LogLevel}
	if cfg.LogIdentities == "hashed" {
		key, err := logKey(cfg.State)
		if err != nil {
			return nil, err
		}
		hash := func(kind, value string) string {
			h := hmac.New(sha256.New, key)
			fmt.Fprint(h, kind, " ", value)
			return hex.EncodeToString(h.Sum(nil)[:12])
		}
		o.ReplaceAttr = func(_ []string, a slog.Attr) slog.Attr {
			switch a.Key {
			case "imsi", "imei":
				a.Value = slog.StringValue(hash(a.Key, a.Value.String()))
			case "cause": // it may name a row or a list by them
				a.Value = slog.StringValue(identity.ReplaceAllStringFunc(a.Value.String(), func(digits string) string {
					if len(digits) == kme.IMEIDigits {
						return hash("imei", digits)
					}
					return hash("imsi", digits)
				}))
			}
			return a
		}
	}
	return terminal.NewLog(w, o), nil
}

// starting logs the first line: version, store, tokens, clients and addresses.
func starting(log *slog.Logger, cfg *settings.Config) {
	tokens := make([]string, len(cfg.Tokens))
	for i, uri := range cfg.Tokens {
		tokens[i], _, _ = strings.Cut(uri, "?") // the rest says where module and PIN are
	}
	clients := []string{}
	for _, c := range cfg.Clients {
		clients = append(clients, c.Name)
	}
	if len(clients) == 0 {
		clients = []string{"own user"}
	}
	log.Info("starting", "version", version.Text(), "store", shownStore(cfg.Store), "tokens", tokens,
		"clients", clients, "addresses", slices.DeleteFunc([]string{cfg.Listen, cfg.OperatorPage.Listen,
			cfg.Socket}, func(a string) bool { return a == "" }))
}

// shownStore is a store's name without a password.
func shownStore(name string) string {
	if strings.HasPrefix(name, "sqlite:") {
		return name
	}
	u, err := url.Parse(name)
	if err != nil {
		return "postgres"
	}
	return u.Scheme + "://" + u.User.Username() + "@" + u.Host + u.Path
}

// identity finds an IMEI, of 14 digits here, and an IMSI, of 15.
var identity = regexp.MustCompile(`\b[0-9]{14,15}\b`)

// logKey is made once.
func logKey(state string) ([]byte, error) {
	path := filepath.Join(state, "log.key")
	key, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key = make([]byte, 32)
		rand.Read(key)
		err = durable.WriteFile(path, key, 0o600)
	}
	if err == nil && len(key) != 32 {
		err = fmt.Errorf("%s is damaged: remove it, and later hashes are others than earlier ones", path)
	}
	return key, err
}
