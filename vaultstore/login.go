package vaultstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/panics"
)

// A Login says how to get a token. With none of its fields set, the token is the environment's, VAULT_TOKEN.
type Login struct {
	RoleID       string // AppRole
	SecretIDFile string // AppRole's secret id; a file, since a secret on a command line is open to the machine
	Wrapped      bool   // what the file has is a wrapping token for the secret id, good once
	CertRole     string // TLS certificate (VAULT_CLIENT_CERT, VAULT_CLIENT_KEY), in this role

	// Wait is for a service, which starts without its directory, and whose calls do not wait for a silent one. It is no
	// error if Vault is away at first, or does not answer within answerTimeout: the login is tried until it succeeds.
	// Each request gets answerTimeout, with all its repetitions.
	Wait bool
}

// answerTimeout bounds what a service waits for Vault. A login gets loginTimeout: a wrapping token whose answer is
// given up is lost.
const (
	answerTimeout = 2 * time.Second
	loginTimeout  = time.Minute
)

// ErrSettings is in an error of the environment or the login, for which Vault need not be asked.
var ErrSettings = errors.New("the environment does not name Vault, or the login to it, as it must")

// settings marks an error as one of ErrSettings, and leaves its text.
type settings struct{ error }

func (s settings) Is(target error) bool { return target == ErrSettings }
func (s settings) Unwrap() error        { return s.error }

// Validate refuses a login that mixes the three ways, or lacks a part.
func (l Login) Validate() error {
	appRole := l.RoleID != "" || l.SecretIDFile != ""
	switch {
	case appRole && l.CertRole != "":
		return errors.New("log in to Vault by AppRole or by certificate, not both")
	case appRole && (l.RoleID == "" || l.SecretIDFile == ""):
		return errors.New("AppRole needs a role id and a file with the secret id")
	case l.Wrapped && !appRole:
		return errors.New("only an AppRole's secret id can be wrapped")
	}
	return nil
}

// Connect makes a client from Vault's usual environment (VAULT_ADDR, VAULT_CACERT and so on), and logs in. Until ctx
// ends, it renews the token, and logs in anew when a token ends. log is told of that, but never gets a token.
func Connect(ctx context.Context, l Login, log *slog.Logger) (*api.Client, error) {
	if err := l.Validate(); err != nil {
		return nil, settings{error: err}
	}
	client, err := fromEnvironment()
	if err != nil {
		return nil, err
	}
	s := &session{client: client, login: l, log: log}
	var silent <-chan time.Time
	if l.Wait {
		client.SetClientTimeout(answerTimeout)
		silent = time.After(answerTimeout)
	}
	first := make(chan error, 1)
	var secret *api.Secret // set before first is
	go func() {
		var err error
		secret, err = s.token(ctx)
		first <- err
	}()
	select {
	case err = <-first:
		if err != nil && !(l.Wait && errors.Is(err, directory.ErrUnavailable)) {
			return nil, err
		}
		first <- err
	case <-silent:
		log.WarnContext(ctx, "Vault has not answered the login yet")
	}
	go func() {
		if err := <-first; err != nil {
			secret = s.tokenAtLast(ctx, err)
		}
		s.keep(ctx, secret)
	}()
	return client, nil
}

// CheckEnvironment refuses an environment that names no Vault, or one of another machine without TLS.
func CheckEnvironment() error {
	_, err := fromEnvironment()
	return err
}

// fromEnvironment makes a client without a login.
func fromEnvironment() (*api.Client, error) {
	if err := checkClosed("the key of the client's certificate", os.Getenv(api.EnvVaultClientKey)); err != nil {
		return nil, environment(err)
	}
	config := api.DefaultConfig()
	if config.Error != nil {
		return nil, environment(config.Error)
	}
	config.MaxRetries = 5
	config.MinRetryWait, config.MaxRetryWait = 100*time.Millisecond, 2*time.Second
	client, err := api.NewClient(config)
	if _, perr := url.Parse(config.Address); perr != nil {
		return nil, noAddress(config.Address)
	} else if err != nil {
		return nil, environment(err)
	}
	own, err := url.Parse(client.Address())
	if err != nil || own.Host == "" || own.Scheme != "http" && own.Scheme != "https" {
		return nil, noAddress(client.Address())
	}
	if !private(own) {
		return nil, environment(fmt.Errorf("whoever is on the way to %s could read the login: have Vault serve TLS, "+
			"and set VAULT_ADDR to https://%s; http is only for this machine", own.Redacted(), own.Host))
	}
	if config.HttpClient.Transport.(*http.Transport).TLSClientConfig.InsecureSkipVerify && !local(own) {
		return nil, environment(errors.New("with VAULT_SKIP_VERIFY, anybody on the way could pose as Vault and have " +
			"the login: unset it, and name Vault's CA with VAULT_CACERT; it is only for this machine"))
	}
	config.HttpClient.Transport = bounded{RoundTripper: config.HttpClient.Transport} // also for the client's clones
	client.SetCheckRetry(retryPolicy(own.Host))
	return client, nil
}

// private says whether nobody on the way to a server reads what is sent there.
func private(to *url.URL) bool { return to.Scheme == "https" || local(to) }

// local says whether a server is on this machine, so that nobody is on the way to it.
func local(to *url.URL) bool {
	ip := net.ParseIP(to.Hostname())
	return to.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
}

// checkClosed refuses a secret's file that every user of the machine may read. It is no error if there is none.
func checkClosed(what, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return nil
	}
	if err := durable.Closed(what+", "+path+",", info); err != nil {
		return fmt.Errorf("%w: chmod 0600 it, and replace it if others had access", err)
	}
	return nil
}

// environment makes an error about the environment for Vault.
func environment(err error) error {
	return settings{error: fmt.Errorf("the environment for Vault: %w", err)}
}

func noAddress(text string) error {
	return environment(fmt.Errorf("VAULT_ADDR is https://HOST:PORT, or http://HOST:PORT of this machine, not %q", text))
}

// A bounded transport limits the size of answers: the library reads them into memory, and a hostile Vault must be able
// to do no more than be silent. The longest answers are lists of names, of a line's lots or of a lot's shards.
type bounded struct{ http.RoundTripper }

const (
	maxAnswer = 4 * directory.MaxObject
	maxNames  = 64 << 20
)

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := b.RoundTripper.RoundTrip(r)
	if err == nil {
		most := int64(maxAnswer)
		if r.URL.Query().Has("list") {
			most = maxNames
		}
		answer.Body = http.MaxBytesReader(nil, answer.Body, most)
	}
	return answer, err
}

// patient is a client like the session's, with the time of a login.
func (s *session) patient() (*api.Client, error) {
	c, err := s.client.Clone()
	if err == nil {
		c.SetToken(s.client.Token())
		c.SetClientTimeout(loginTimeout)
	}
	return c, err
}

var errNoActive = errors.New("no node of this Vault is active")

// retryPolicy is the client library's, with rules for redirects. A standby that cannot forward a request redirects it
// to the active node. After an unsealing, that may be itself, or a node that is not active any more. The library
// follows one redirect, and takes a second one for an answer without a body: a write would count as done, and a read as
// not found. So only the server at own, the client's address, may redirect, and only to another server. Otherwise the
// request is tried again, and in the end fails. A request that would go to another machine without TLS is not sent.
func retryPolicy(own string) func(context.Context, *http.Response, error) (bool, error) {
	return func(ctx context.Context, r *http.Response, err error) (bool, error) {
		if err == nil && r.StatusCode >= 300 && r.StatusCode < 400 {
			to, err := r.Location()
			if err != nil || r.Request.URL.Host != own || to.Host == own {
				return true, errNoActive
			}
			if !private(to) {
				return false, fmt.Errorf("a redirect of Vault is to %s://%s, which has no TLS: correct the api_addr "+
					"of that node", to.Scheme, to.Host)
			}
		}
		return api.DefaultRetryPolicy(ctx, r, err)
	}
}

// A session belongs to the goroutine that runs keep.
type session struct {
	client   *api.Client
	login    Login
	log      *slog.Logger
	secretID string // unwrapped once, since the wrapping token is good once
}

// token logs in, and gives the token's lease; nil if the token does not expire.
func (s *session) token(ctx context.Context) (secret *api.Secret, err error) {
	defer panics.Recover(&err)
	var path string
	var body map[string]any
	switch {
	case s.login.RoleID != "":
		secretID, err := s.readSecretID(ctx)
		if err != nil {
			return nil, err
		}
		path, body = "auth/approle/login", map[string]any{"role_id": s.login.RoleID, "secret_id": secretID}
	case s.login.CertRole != "":
		path, body = "auth/cert/login", map[string]any{"name": s.login.CertRole}
	default:
		return s.ownToken(ctx)
	}
	// Whatever token there was must not come along: an ended one is refused even at login.
	fresh, err := s.patient()
	if err != nil {
		return nil, err
	}
	fresh.ClearToken()
	secret, err = fresh.Logical().WriteWithContext(ctx, path, body)
	if err != nil {
		return nil, loginError(err)
	}
	if secret == nil || secret.Auth == nil {
		return nil, errors.New("the answer to the login to Vault has no token")
	}
	s.client.SetToken(secret.Auth.ClientToken)
	return secret, nil
}

// ownToken looks at the environment's token: one that can be renewed is, as the login's would be.
func (s *session) ownToken(ctx context.Context) (*api.Secret, error) {
	if s.client.Token() == "" {
		return nil, settings{error: errors.New("no login to Vault: set VAULT_TOKEN, or log in by AppRole or by " +
			"certificate")}
	}
	client, err := s.patient()
	if err != nil {
		return nil, err
	}
	self, err := client.Auth().Token().LookupSelfWithContext(ctx)
	if statusOf(err) == 403 {
		return nil, nil // a token need not be allowed to look at itself
	}
	if err != nil {
		return nil, loginError(err)
	}
	ttl, err := self.TokenTTL()
	if err != nil {
		return nil, err
	}
	renewable, err := self.TokenIsRenewable()
	if err != nil || !renewable || ttl == 0 {
		return nil, err
	}
	return &api.Secret{Auth: &api.SecretAuth{ClientToken: s.client.Token(), Renewable: true,
		LeaseDuration: int(ttl.Seconds())}}, nil
}

func (s *session) readSecretID(ctx context.Context) (string, error) {
	if s.secretID != "" && s.login.Wrapped {
		return s.secretID, nil
	}
	if err := checkClosed("the AppRole's secret id", s.login.SecretIDFile); err != nil {
		return "", settings{error: err}
	}
	b, err := os.ReadFile(s.login.SecretIDFile)
	if err != nil {
		return "", settings{error: fmt.Errorf("the AppRole's secret id: %w", err)}
	}
	id := strings.TrimSpace(string(b))
	if s.login.Wrapped {
		client, err := s.patient()
		if err != nil {
			return "", err
		}
		secret, err := client.Logical().UnwrapWithContext(ctx, id)
		if status := statusOf(err); err != nil && status != 400 && status != 403 {
			return "", loginError(err)
		} else if err != nil {
			return "", errors.New("the AppRole's secret id cannot be unwrapped: its wrapping token has ended or was " +
				"used before; if it was not used by us, somebody else has the secret id")
		}
		var ok bool
		if id, ok = secret.Data["secret_id"].(string); !ok {
			return "", errors.New("what the wrapping token holds is no secret id")
		}
		s.secretID = id
	}
	return id, nil
}

// loginError says what a refused login means, without the request's URL and body.
func loginError(err error) error {
	r, ok := errors.AsType[*api.ResponseError](err)
	if !ok {
		return fmt.Errorf("log in to Vault: %w: %w: see that it runs, and that VAULT_ADDR is its address",
			directory.ErrUnavailable, err)
	}
	reason := reasons(r)
	if r.StatusCode >= 500 || r.StatusCode == 429 {
		return fmt.Errorf("log in to Vault: %w (%d): %s", directory.ErrUnavailable, r.StatusCode, reason)
	}
	return fmt.Errorf("the login to Vault is refused (%d): %s", r.StatusCode, reason)
}

// keep renews the token for as long as Vault lets it, then logs in anew.
func (s *session) keep(ctx context.Context, secret *api.Secret) {
	for secret != nil && ctx.Err() == nil {
		if err := s.renew(ctx, secret); err != nil {
			s.log.WarnContext(ctx, "the Vault token is not renewed any more", "cause", err.Error())
		}
		if s.login.RoleID == "" && s.login.CertRole == "" {
			return // it was the environment's: there is no login to do again
		}
		secret = s.tokenAtLast(ctx, nil)
	}
}

// tokenAtLast tries to log in until it succeeds.
func (s *session) tokenAtLast(ctx context.Context, err error) (secret *api.Secret) {
	for wait := time.Second; ctx.Err() == nil; wait = min(2*wait, time.Minute) {
		if err != nil {
			s.log.WarnContext(ctx, "the login to Vault fails; it is tried again", "cause", err.Error())
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(wait/2 + rand.N(wait/2)):
			}
		}
		if secret, err = s.token(ctx); err == nil {
			s.log.InfoContext(ctx, "logged in to Vault anew")
			break
		}
	}
	return secret
}

// renew renews the token when half of its life is over. It returns when Vault gives the token a clearly shorter life
// than at first: then the token nears the end of its longest life. It is still good, so that there is time to get a new
// one. The client library's LifetimeWatcher waits longer, and left a gap.
func (s *session) renew(ctx context.Context, secret *api.Secret) (err error) {
	defer panics.Recover(&err)
	first := time.Duration(secret.Auth.LeaseDuration) * time.Second
	if first == 0 { // it does not end
		<-ctx.Done()
		return nil
	}
	for life := first; life > first*2/3; {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(life / 2):
		}
		renewed, err := s.client.Auth().Token().RenewSelfWithContext(ctx, secret.Auth.LeaseDuration)
		if err != nil {
			return loginError(err)
		}
		if renewed == nil || renewed.Auth == nil {
			return errors.New("the answer to the renewal has no token")
		}
		life = time.Duration(renewed.Auth.LeaseDuration) * time.Second
	}
	return nil
}
