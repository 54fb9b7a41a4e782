package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// demoPort is where the demo's registry listens if the port is free, so that
// its images have the same names at every start.
const demoPort = 5055

// demo is a registry in this process, on loopback, with a small image.
type demo struct {
	server *http.Server
	served chan error
	host   string // "localhost:5055"
	port   int
}

// startDemo makes the image and serves it until Close, on the port where it was
// before, so that what was pulled from there keeps its name. 0 is nowhere.
func startDemo(before int) (*demo, error) {
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(cmp.Or(before, demoPort))))
	if err != nil && before == 0 {
		listener, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		return nil, err
	}
	port := listener.Addr().(*net.TCPAddr).Port
	quiet := log.New(io.Discard, "", 0)
	d := &demo{
		server: &http.Server{
			Handler: registry.New(registry.Logger(quiet)), ErrorLog: quiet, ReadHeaderTimeout: 10 * time.Second,
		},
		served: make(chan error, 1),
		host:   fmt.Sprintf("localhost:%d", port),
		port:   port,
	}
	go func() { d.served <- d.server.Serve(listener) }()
	if err := d.fill(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// fill pushes the images.
func (d *demo) fill() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	images, err := demoImages()
	if err != nil {
		return err
	}
	for tag, img := range images {
		ref, err := name.ParseReference(d.host+"/demo:"+tag, name.Insecure)
		if err != nil {
			return err
		}
		// No proxy stands between a process and itself.
		transport := &http.Transport{}
		err = remote.Write(ref, img, remote.WithContext(ctx), remote.WithTransport(transport))
		transport.CloseIdleConnections()
		if err != nil {
			return err
		}
	}
	return nil
}

// repository is the path of the demo's images below a mount.
func (d *demo) repository() string { return d.host + "/demo" }

// hints are command lines to try.
func (d *demo) hints(dir string) []string {
	image := filepath.Join(dir, d.repository())
	return []string{
		fmt.Sprintf("Serving the image %s/demo:latest; try:", d.host),
		fmt.Sprintf("  ls %s/latest/etc", image),
		fmt.Sprintf("  cat %s/latest/etc/os-release", image),
		fmt.Sprintf("  diff -r %s/base %s/latest", image, image),
		fmt.Sprintf("  imgfs images && imgfs umount %s", dir),
	}
}

// Close stops the registry.
func (d *demo) Close() error {
	err := d.server.Close()
	if served := <-d.served; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}
