//! The engine as the way into its networks: by address, and by a program in a container.

#![cfg(test)]

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use upgrade_core::error::StepError;
use upgrade_core::registry::BuildContext;
use upgrade_core::testkit::TestContext;
use upgrade_core::tunnel::{Passage, Tunnel as _};
use upgrade_docker::Engine;
use upgrade_testbed::docker::Image;
use upgrade_testbed::postgres::{self, Version};

use crate::world::{Corner, target};

fn through(corner: &Corner, tunnel: &serde_json::Value) -> Engine {
    let config = serde_json::from_value(json!({ "host": corner.engine.host(), "tunnel": tunnel })).unwrap();
    Engine::from_config(config, &BuildContext::new("/")).unwrap()
}

async fn open(engine: &Engine, host: &str, port: u16) -> Result<Passage, StepError> {
    engine.open(&TestContext::new("step").forward(), host, port).await
}

/// Opens what cannot be opened; on a busy machine a program may be too slow to say so the first time.
async fn refused(corner: &Corner, tunnel: &serde_json::Value, host: &str, port: u16) -> StepError {
    for _ in 0..20 {
        if let Err(error) = open(&through(corner, tunnel), host, port).await {
            return error;
        }
    }
    panic!("{host}:{port} was not refused");
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

/// Gives the address of the bridge of the shared engine, which its containers reach this machine at.
fn bridge(corner: &Corner) -> String {
    corner.engine.docker(["network", "inspect", "bridge", "--format", "{{range .IPAM.Config}}{{.Gateway}}{{end}}"])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_reached_at_its_address_by_name_or_as_a_service() {
    let Some(corner) = Corner::shared("tunnel") else { return };
    let (web, image, service) = (corner.name("web"), corner.name("web:1"), corner.name("service"));
    Image::web("1.0").build(&corner.engine, &image);
    let label = format!("com.docker.compose.service={service}");
    corner.engine.docker(["run", "-d", "--name", &web, "--label", &label, &image]);
    let engine = target(corner.engine.host());
    for host in [&web, &service] {
        let mut tries = 0;
        let passage = loop {
            match open(&engine, host, 8080).await {
                Ok(passage) => break passage,
                // It does not listen yet.
                Err(error) if tries < 50 => assert!(error.hint().unwrap().contains("tunnel: {"), "{error:?}"),
                Err(error) => panic!("{error:?}"),
            }
            tries += 1;
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let address = passage.address();
        assert!(address.ip().is_loopback());
        for _ in 0..3 {
            assert!(get(address, "/version").await.ends_with("1.0\n"));
        }
        drop(passage);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(TcpStream::connect(address).await.is_err());
    }
    let error = open(&engine, &corner.name("none"), 1).await.unwrap_err();
    assert!(error.message().contains("no running container or service"), "{error:?}");
    corner.engine.docker(["stop", &web]);
    let error = open(&engine, &web, 8080).await.unwrap_err();
    assert!(error.message().contains("exited with"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_in_a_container_carries_what_this_machine_does_not_reach() {
    let Some(corner) = Corner::shared("carry") else { return };
    let (jump, image) = (corner.name("jump"), corner.name("jump:1"));
    Image::shell("sleep 1000").build(&corner.engine, &image);
    corner.engine.docker(["run", "-d", "--name", &jump, &image]);
    let engine = through(&corner, &json!({ "container": jump }));
    // An echo at an address that the container reaches.
    let gateway = bridge(&corner);
    let Ok(echo) = TcpListener::bind((gateway.as_str(), 0)).await else {
        eprintln!("skipped: the engine is on another machine");
        return;
    };
    let port = echo.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = echo.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
            });
        }
    });
    let passage = open(&engine, &gateway, port).await.unwrap();
    // More than any buffer on the way, every value of a byte, and several at once.
    let sent: Vec<u8> = (0..1 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let both = futures_util::future::join_all((0..3).map(|_| async {
        let (mut from, mut to) = TcpStream::connect(passage.address()).await.unwrap().into_split();
        let mut back = vec![0; sent.len()];
        let (written, read) = tokio::join!(to.write_all(&sent), from.read_exact(&mut back));
        written.unwrap();
        read.unwrap();
        back
    }));
    for back in both.await {
        assert!(back == sent);
    }
    let mut idle = TcpStream::connect(passage.address()).await.unwrap();
    drop(passage);
    let ended = tokio::time::timeout(Duration::from_secs(5), idle.read(&mut [0; 1])).await;
    assert!(!matches!(ended, Ok(Ok(1)) | Err(_)), "{ended:?}");

    let error = refused(&corner, &json!({ "container": jump }), &gateway, 1).await;
    assert!(error.message().contains("ended at once with 1"), "{error:?}");
    let socat = json!({ "container": jump, "command": ["socat", "-", "TCP:{host}:{port}"] });
    let error = refused(&corner, &socat, &gateway, port).await;
    assert!(error.message().contains("socat"), "{error:?}");
    let error = open(&through(&corner, &json!({ "container": corner.name("none") })), "db", 1).await.unwrap_err();
    assert!(error.message().contains("there is no container"), "{error:?}");
    corner.engine.docker(["stop", &jump]);
    let error = open(&engine, &gateway, port).await.unwrap_err();
    assert!(error.message().contains("exited with"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_behind_it_answers() {
    let (Some(corner), Some(server)) = (Corner::shared("database"), postgres::shared(Version::V15)) else { return };
    let database = server.database();
    let (jump, image) = (corner.name("jump"), corner.name("jump:1"));
    Image::shell("sleep 1000").build(&corner.engine, &image);
    corner.engine.docker(["run", "-d", "--name", &jump, &image]);
    let gateway = bridge(&corner);
    let Ok(listener) = TcpListener::bind((gateway.as_str(), 0)).await else { return };
    let port = listener.local_addr().unwrap().port();
    let place = (database.host().to_owned(), database.port());
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let place = place.clone();
            tokio::spawn(async move {
                let mut far = TcpStream::connect(place).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    let engine = through(&corner, &json!({ "container": jump }));
    let passage = open(&engine, &gateway, port).await.unwrap();
    let own = format!("{}:{}", database.host(), database.port());
    let url = database.url().replace(&own, &passage.address().to_string());
    assert_ne!(url, database.url());
    let query = "select count(*), sum(length(repeat('x', 1000))) from generate_series(1, 5000)";
    let asked = std::process::Command::new("psql").args(["-Atc", query, &url]).output().unwrap();
    let (said, wrong) = (String::from_utf8_lossy(&asked.stdout), String::from_utf8_lossy(&asked.stderr));
    assert_eq!(said.trim(), "5000|5000000", "{wrong}");
}
